/* LD_PRELOAD: calls on files below a directory do not return while a switch file exists, as on a hung NFS or disk.
 *
 * HANG_BELOW: the directory, or one file. HANG_WHILE: the switch. HANG_ONLY: only processes with that word in their
 * command line. Only what Python and the C library call is here.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int not_here(void)
{
    static char line[4096];
    const char *only = getenv("HANG_ONLY");
    int fd;

    if (!only || !*only)
        return 0;
    if (!line[0]) {
        fd = syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            syscall(SYS_read, fd, line, sizeof line - 1);
            close(fd);
        }
    }
    return !memmem(line, sizeof line, only, strlen(only));
}

static void wait_for(const char *path)
{
    const char *below = getenv("HANG_BELOW"), *when = getenv("HANG_WHILE");

    if (!path || !below || !when || strncmp(path, below, strlen(below)) != 0)
        return;
    if (not_here())
        return;
    if (path[strlen(below)] != '\0' && path[strlen(below)] != '/')
        return;
    while (syscall(SYS_access, when, F_OK) == 0)
        usleep(20000);
}

static void wait_for_fd(int fd)
{
    char link[64], path[4096];
    ssize_t length;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length > 0) {
        path[length] = 0;
        wait_for(path);
    }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = va_arg(list, mode_t); \
        va_end(list); \
        wait_for(path); \
        return REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int stat(const char *restrict path, struct stat *restrict status)
{
    wait_for(path);
    return REAL(stat)(path, status);
}

int stat64(const char *restrict path, struct stat64 *restrict status)
{
    wait_for(path);
    return REAL(stat64)(path, status);
}

int lstat(const char *restrict path, struct stat *restrict status)
{
    wait_for(path);
    return REAL(lstat)(path, status);
}

int lstat64(const char *restrict path, struct stat64 *restrict status)
{
    wait_for(path);
    return REAL(lstat64)(path, status);
}

int rename(const char *from, const char *to)
{
    wait_for(from);
    return REAL(rename)(from, to);
}

int fsync(int fd)
{
    wait_for_fd(fd);
    return REAL(fsync)(fd);
}

ssize_t pread64(int fd, void *buffer, size_t size, off64_t at)
{
    wait_for_fd(fd);
    return REAL(pread64)(fd, buffer, size, at);
}

int utimensat(int at, const char *path, const struct timespec times[2], int flags)
{
    wait_for(path);
    return REAL(utimensat)(at, path, times, flags);
}
