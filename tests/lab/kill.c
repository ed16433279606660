/* Loaded into a dynamically linked hook (LD_PRELOAD): SIGKILL right before its n-th call into the C library.
 *
 * KILL_AT   n, from 1; not set or 0: never
 * KILL_WHO  hook: the process itself; commit: the same, but only its writes of one byte count, which are the last
 *           NULs of the envelopes; part: the processes that it forks, before they become qmail-queue */
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static pid_t hook;
static long at, calls;
static int parts, commit;

__attribute__((constructor)) static void begin(void)
{
  const char *number = getenv("KILL_AT"), *who = getenv("KILL_WHO");
  hook = getpid();
  at = number ? atol(number) : 0;
  parts = who && !strcmp(who, "part");
  commit = who && !strcmp(who, "commit");
}

static void step(int last_nul)
{
  if (!at || (commit && !last_nul) || (getpid() == hook) == parts) return;
  if (++calls == at) kill(getpid(), SIGKILL);
}

#define FIND(type, name) static type (*real)(); if (!real) real = (type (*)())dlsym(RTLD_NEXT, name)
#define REAL(type, name) FIND(type, name); step(0)

int close(int fd) { REAL(int, "close"); return real(fd); }
int pipe2(int ends[2], int flags) { REAL(int, "pipe2"); return real(ends, flags); }
int dup2(int from, int to) { REAL(int, "dup2"); return real(from, to); }
pid_t fork(void) { REAL(pid_t, "fork"); return real(); }
pid_t waitpid(pid_t pid, int *status, int flags) { REAL(pid_t, "waitpid"); return real(pid, status, flags); }
int poll(struct pollfd *fds, nfds_t count, int wait) { REAL(int, "poll"); return real(fds, count, wait); }
int socket(int family, int type, int protocol) { REAL(int, "socket"); return real(family, type, protocol); }
int connect(int fd, const struct sockaddr *to, socklen_t size) { REAL(int, "connect"); return real(fd, to, size); }
int execve(const char *path, char *const a[], char *const e[]) { REAL(int, "execve"); return real(path, a, e); }
ssize_t read(int fd, void *to, size_t room) { REAL(ssize_t, "read"); return real(fd, to, room); }
ssize_t pread(int fd, void *to, size_t room, off_t from) { REAL(ssize_t, "pread"); return real(fd, to, room, from); }
ssize_t send(int fd, const void *from, size_t size, int f) { REAL(ssize_t, "send"); return real(fd, from, size, f); }
ssize_t sendmsg(int fd, const struct msghdr *m, int flags) { REAL(ssize_t, "sendmsg"); return real(fd, m, flags); }
ssize_t recvmsg(int fd, struct msghdr *m, int flags) { REAL(ssize_t, "recvmsg"); return real(fd, m, flags); }

ssize_t splice(int in, off_t *from, int out, off_t *to, size_t size, unsigned flags)
{
  REAL(ssize_t, "splice");
  return real(in, from, out, to, size, flags);
}

ssize_t write(int fd, const void *from, size_t size)
{
  FIND(ssize_t, "write");
  step(size == 1);
  return real(fd, from, size);
}

int sigtimedwait(const sigset_t *set, siginfo_t *info, const struct timespec *wait)
{
  REAL(int, "sigtimedwait");
  return real(set, info, wait);
}

int fcntl(int fd, int command, ...)
{
  va_list more;
  va_start(more, command);
  long argument = va_arg(more, long);
  va_end(more);
  REAL(int, "fcntl");
  return real(fd, command, argument);
}
