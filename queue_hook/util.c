/* Clock, reading, and diagnostics on stderr. */
#include "hook.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static bool quiet;

int64_t now_ms(void)
{
  struct timespec now;
#ifdef __LP64__ /* finding and mapping the vDSO costs more than a few calls save */
  int failed = (int)syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
#else
  int failed = clock_gettime(CLOCK_MONOTONIC, &now);
#endif
  if (failed) leave(ST_BUG); /* only if a sandbox forbids it; no wait would end */
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int left_ms(int64_t end)
{
  int64_t left = end - now_ms();
  return left < 0 ? 0 : left > 86400000 ? 86400000 : (int)left;
}

size_t read_some(int fd, char *to, size_t room)
{
  for (;;) {
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    ssize_t got = read(fd, to, room);
    if (got >= 0) return (size_t)got;
    if (errno == EAGAIN) poll(&wait, 1, -1); /* another process made it non-blocking */
    if (errno != EAGAIN && errno != EINTR) leave(status_of(errno, ST_READ));
  }
}

void say_nothing(void)
{
  quiet = true;
}

/* Never blocks, and is safe when the reader has gone. */
void say(const char *first, ...)
{
  char line[512] = "contentfilter-queue: ";
  size_t size = strlen(line);
  va_list more;
  if (quiet) return;
  va_start(more, first);
  for (const char *part = first; part; part = va_arg(more, const char *))
    for (; *part && size < sizeof line - 1; part++) line[size++] = (char)(*part < ' ' || *part > '~' ? '?' : *part);
  va_end(more);
  line[size++] = '\n';

  struct pollfd ready = {.fd = 2, .events = POLLOUT};
  if (poll(&ready, 1, 0) != 1 || !(ready.revents & POLLOUT)) return;
  void (*before)(int) = signal(SIGPIPE, SIG_IGN);
  if (write(2, line, size) < 0) { /* no reader is left */
  }
  signal(SIGPIPE, before);
}

_Noreturn void leave(enum status status)
{
  _exit((int)status);
}

enum status status_of(int error, enum status otherwise)
{
  return error == ENOMEM || error == EMFILE || error == ENFILE || error == EAGAIN ? ST_MEMORY : otherwise;
}

char *put_number(char *to, uint64_t number)
{
  char digits[20];
  int count = 0;
  do digits[count++] = (char)('0' + number % 10);
  while (number /= 10);
  while (count) *to++ = digits[--count];
  *to = 0;
  return to;
}

char *put_bytes(char *to, uint64_t number, int bytes)
{
  for (; bytes--; number >>= 8) *to++ = (char)(number & 255);
  return to;
}
