# docker build .                  the daemon and the hook, without compilers, as an ordinary user
# docker build --target test .    the same sources through `make test`

FROM debian:bookworm-slim AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/*

FROM base AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev musl-tools python3-venv
COPY . /src
RUN python3 -m venv /opt/contentfilter && /opt/contentfilter/bin/pip install --no-cache-dir /src

FROM base AS test
RUN apt-get update && apt-get install -y --no-install-recommends make
COPY . /src
WORKDIR /src
RUN make test

FROM base
RUN useradd --system --home-dir /var/lib/contentfilter --create-home contentfilter \
 && install -d -o contentfilter /run/contentfilter
COPY --from=build /opt/contentfilter /opt/contentfilter
ENV PATH=/opt/contentfilter/bin:$PATH
USER contentfilter
VOLUME ["/run/contentfilter", "/var/lib/contentfilter"]
ENTRYPOINT ["contentfilter"]
CMD ["serve"]
