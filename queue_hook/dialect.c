/* Rejections, in the dialect of the caller. Every qmail knows the statuses 31 and 71; some also read a text, each from
 * a different descriptor and for a different status. In other builds the same descriptor may be a TLS control pipe, a
 * socket, or closed; so the text is written only into a pipe, and only if that cannot block. Otherwise the plain status
 * is used. */
#include "hook.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool writable_pipe(int fd)
{
  struct stat about;
  int flags = fd < 0 ? -1 : fcntl(fd, F_GETFL);
  return flags != -1 && (flags & O_ACCMODE) != O_RDONLY && !fstat(fd, &about) && S_ISFIFO(about.st_mode);
}

/* The value of a small decimal number, otherwise -1. */
static int small_number(const char *text)
{
  int value = -1;
  for (; text && *text; text++) {
    if (*text < '0' || *text > '9' || value > 100000) return -1;
    value = (value < 0 ? 0 : value) * 10 + (*text - '0');
  }
  return value;
}

/* Variables of ucspi-ssl: the descriptors by which a server requests TLS. */
static bool tls_control(int fd)
{
  static const char *const names[] = {"SSLCTLFD", "SSLREADFD", "SSLWRITEFD"};
  for (size_t i = 0; i < 3; i++)
    if (small_number(getenv(names[i])) == fd) return true;
  return false;
}

static int error_fd(int usual)
{
  const char *text = getenv("ERROR_FD");
  return text && *text ? small_number(text) : usual;
}

static bool send_text(int fd, bool permanent, const char *text, size_t size)
{
  char line[TEXT_MAX + 1];
  struct pollfd ready = {.fd = fd, .events = POLLOUT};
  if (size < 2 || size > TEXT_MAX || !writable_pipe(fd)) return false;
  if (poll(&ready, 1, 0) != 1) return false;
  line[0] = permanent ? 'D' : 'Z';
  memcpy(line + 1, text, size);
  signal(SIGPIPE, SIG_IGN);
  return write(fd, line, size + 1) == (ssize_t)size + 1;
}

enum status refuse(const struct conf *conf, bool permanent, enum reason reason, const char *text, size_t size)
{
  enum status plain = permanent ? ST_REJECT : ST_DEFER;
  enum status with_text = ST_TEXT;
  int fd = -1;
  switch (conf->dialect) {
    case AUTO:
      if (writable_pipe(6) && !tls_control(6))
        fd = 6;
      else if (writable_pipe(4) && !tls_control(4))
        fd = 4;
      break;
    case STOCK:
      break;
    case NOTQMAIL:
      fd = 6;
      break;
    case SAGREDO:
      fd = error_fd(4);
      break;
    case SIMSCAN:
      fd = 4;
      break;
    case INDIMAIL:
      fd = error_fd(2);
      with_text = ST_TEXT_IM;
      break;
    case SQMAIL:
      if (!permanent) break;
      return reason == VIRUS ? ST_SQ_VIRUS : reason == SPAM ? ST_SQ_SPAM : reason == BANNED ? ST_SQ_BANNED : plain;
  }
  return send_text(fd, permanent, text, size) ? with_text : plain;
}
