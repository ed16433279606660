# Image with the daemon and the hook. See docs/container.md.
#
#   docker build -t contentfilter .                 the daemon, without compilers and without root
#   docker build --target test .                    the same sources through `make test`
#   docker build --build-arg BASE=IMAGE ...         on another base: Debian 12 or later
#
# podman and buildah need --format docker: an OCI image has no health check. Only Debian's archive and PyPI are used;
# configure another mirror or index in the base image or in a mounted configuration of apt or pip.

ARG BASE=docker.io/library/debian:bookworm-slim

# Debian's python3, so that all security updates come from one source. ca-certificates: for [mariadb] tls = "verify".
FROM ${BASE} AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log

# The wheel with the static hook, and an environment without pip and compilers.
FROM base AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev musl-tools python3-venv
COPY . /src
RUN python3 -m venv /pip \
 && /pip/bin/pip wheel --no-cache-dir --wheel-dir /wheels /src \
 && python3 -m venv --without-pip /opt/contentfilter \
 && /pip/bin/pip --python /opt/contentfilter/bin/python install --no-index --find-links /wheels contentfilter

# Runs `make test` with Debian's clamd, spamd, MariaDB and Prometheus; as root, because the tests change users. Takes
# minutes and adds nothing to the image. Tests that need privileges a build does not have (mounting a full disk, tracing
# another user's process) are skipped, as pytest's last lines show.
FROM base AS test
RUN apt-get update && apt-get install -y --no-install-recommends make
COPY . /src
WORKDIR /src
RUN make test

# The final image. The uid is fixed, because directories on the host belong to it.
FROM base
LABEL org.opencontainers.image.title="contentfilter" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.description="Content filter for qmail: the daemon, and the hook to copy out" \
      org.opencontainers.image.documentation="docs/container.md"
RUN groupadd --gid 9464 contentfilter \
 && useradd --uid 9464 --gid 9464 --no-create-home --home-dir /var/lib/contentfilter --shell /usr/sbin/nologin contentfilter \
 && install -d -o contentfilter -g contentfilter -m 0755 /run/contentfilter \
 && install -d -o contentfilter -g contentfilter -m 0700 /var/lib/contentfilter \
 && install -d -m 0755 /etc/contentfilter /var/qmail/control
COPY --from=build /opt/contentfilter /opt/contentfilter
ENV PATH=/opt/contentfilter/bin:/usr/local/bin:/usr/bin:/bin
USER 9464:9464
VOLUME ["/run/contentfilter", "/var/lib/contentfilter"]
EXPOSE 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
    CMD ["/opt/contentfilter/bin/python", "-I", "/opt/contentfilter/share/contentfilter/container/healthy.py"]
ENTRYPOINT ["/opt/contentfilter/bin/contentfilter"]
CMD ["serve"]
