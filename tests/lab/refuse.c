/* A disk that fails, for a program that is linked with libc: preloaded, it makes calls on one directory fail.
 *
 *   LD_PRELOAD=refuse.so REFUSE_UNDER=/directory REFUSE_WITH=/file program
 *
 * As long as the file is there, everything that writes below the directory fails with the errno that is its text.
 * With the text "hang", everything below it, looking included, waits until the file is gone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* errno for calls that write now, or 0; by the system call itself, for open(2) is ours */
static int trouble(void)
{
  const char *file = getenv("REFUSE_WITH");
  char text[16] = "";
  int fd = file ? (int)syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0) return 0;
  long got = syscall(SYS_read, fd, text, sizeof text - 1);
  syscall(SYS_close, fd);
  if (got > 0 && text[0] == 'h') {
    usleep(20000);
    return trouble();
  }
  return got > 0 ? atoi(text) : 0;
}

static int below(const char *path)
{
  const char *under = getenv("REFUSE_UNDER");
  return under && !strncmp(path, under, strlen(under));
}

static int refused_path(const char *path)
{
  int saved = errno, error = path && below(path) ? trouble() : 0;
  errno = error ? error : saved;
  return error;
}

static int refused(int fd)
{
  char link[64], path[4096];
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  long size = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (size <= 0) return 0;
  path[size] = 0;
  return refused_path(path);
}

#define TRUE(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
#define ON_FD(type, name, parameters, arguments) \
  type name parameters { return refused(fd) ? -1 : TRUE(type, #name, ) arguments; }
#define ON_PATH(name, parameters, path, arguments) \
  int name parameters { return refused_path(path) ? -1 : TRUE(int, #name, ) arguments; }

ON_FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_FD(int, fsync, (int fd), (fd))
ON_FD(int, fdatasync, (int fd), (fd))
ON_FD(int, ftruncate, (int fd, off_t size), (fd, size))
ON_FD(int, ftruncate64, (int fd, off_t size), (fd, size))
ON_PATH(mkdir, (const char *path, mode_t mode), path, (path, mode))
ON_PATH(unlink, (const char *path), path, (path))
ON_PATH(rename, (const char *from, const char *to), from, (from, to))
ON_PATH(link, (const char *from, const char *to), to, (from, to))

#define OPEN(name) \
  int name(const char *path, int flags, ...) \
  { \
    va_list more; \
    va_start(more, flags); \
    int mode = va_arg(more, int); \
    va_end(more); \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && refused_path(path)) return -1; \
    return TRUE(int, #name, const char *, int, ...)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
