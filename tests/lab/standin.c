/* A strict stand-in for qmail-queue: reads the message from fd 0 to its end, then the envelope from fd 1, with
 * qmail-queue's grammar and statuses, and records only what is complete.
 *
 * STANDIN_DIR      where to record PID.msg, PID.env and PID.info; not set: read everything, record nothing
 * STANDIN_FSYNC    set: fsync message and envelope, as the real one does
 * The knobs for faults act at one point, and only for messages that contain a text:
 * STANDIN_AT       message (has been read) | envelope (its first byte was read) | end (all was read)
 * STANDIN_WHEN     a text in the first 64 KiB of the message; not set: every message
 * STANDIN_EXIT     leave with this status
 * STANDIN_SIGNAL   die by this signal
 * STANDIN_STALL    set: create DIR/PID.stalled and wait to be killed, at most a minute */
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ADDRESS = 1003, ROOM = 65536 };

static const char *dir;
static char head[ROOM], bytes[ROOM], envelope_bytes[ROOM];
static size_t head_size, have, used, first_read = ROOM;

static void path_of(char path[512], const char *end)
{
  snprintf(path, 512, "%s/%d%s", dir, (int)getpid(), end);
}

static void remove_all(void)
{
  static const char *const ends[] = {".msg.tmp", ".env.tmp", ".info.tmp"};
  char path[512];
  for (int i = 0; dir && i < 3; i++) {
    path_of(path, ends[i]);
    unlink(path);
  }
}

static _Noreturn void leave(int status)
{
  remove_all();
  _exit(status);
}

static void fault(const char *point)
{
  const char *at = getenv("STANDIN_AT"), *when = getenv("STANDIN_WHEN");
  char path[512];
  if (!at || strcmp(at, point)) return;
  if (when && !memmem(head, head_size, when, strlen(when))) return;
  if (getenv("STANDIN_STALL")) {
    if (dir) {
      path_of(path, ".stalled");
      close(open(path, O_CREAT | O_WRONLY, 0644));
    }
    poll(NULL, 0, 60000);
  }
  if (getenv("STANDIN_SIGNAL")) {
    remove_all();
    raise(atoi(getenv("STANDIN_SIGNAL")));
  }
  if (getenv("STANDIN_EXIT")) leave(atoi(getenv("STANDIN_EXIT")));
}

static int record(const char *end)
{
  char path[512];
  if (!dir) return -1;
  path_of(path, end);
  int fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
  if (fd < 0) leave(63);
  return fd;
}

static void keep(int fd, const char *from, size_t size)
{
  if (fd >= 0 && write(fd, from, size) != (ssize_t)size) leave(53);
}

static void finish(int fd)
{
  if (fd >= 0 && getenv("STANDIN_FSYNC") && fsync(fd)) leave(53);
  if (fd >= 0 && close(fd)) leave(53);
}

static void read_message(void)
{
  int fd = record(".msg.tmp");
  ssize_t got;
  while ((got = read(0, bytes, sizeof bytes)) > 0) {
    size_t more = (size_t)got < ROOM - head_size ? (size_t)got : ROOM - head_size;
    memcpy(head + head_size, bytes, more);
    head_size += more;
    keep(fd, bytes, (size_t)got);
  }
  if (got < 0) leave(54);
  finish(fd);
}

static char next(void)
{
  if (used == have) {
    ssize_t got = read(1, envelope_bytes, first_read);
    first_read = sizeof envelope_bytes;
    if (got <= 0) leave(54);
    have = (size_t)got;
    used = 0;
  }
  return envelope_bytes[used++];
}

static void read_envelope(void)
{
  static char kept[ROOM];
  size_t size = 0;
  int fd = record(".env.tmp");
  for (char letter = 'F';; letter = 'T') {
    char first = next();
    if (letter == 'F') fault("envelope");
    kept[size++] = first;
    if (letter == 'T' && !first) break;
    if (first != letter) leave(91);
    int length = 0;
    for (; length < ADDRESS; length++) {
      char c = next();
      if (size == sizeof kept) {
        keep(fd, kept, size);
        size = 0;
      }
      kept[size++] = c;
      if (!c) break;
    }
    if (length >= ADDRESS) leave(11);
    if (size > sizeof kept - 8) {
      keep(fd, kept, size);
      size = 0;
    }
  }
  keep(fd, kept, size);
  finish(fd);
}

static void write_info(int count, char **arguments)
{
  extern char **environ;
  if (!dir) return;
  int fd = record(".info.tmp");
  FILE *info = fdopen(fd, "w");
  DIR *open_files = opendir("/proc/self/fd");
  struct dirent *entry;
  if (!info || !open_files) leave(63);
  fprintf(info, "pid %d%cppid %d%cuid %d%c", (int)getpid(), 0, (int)getppid(), 0, (int)getuid(), 0);
  for (int i = 0; i < count; i++) fprintf(info, "arg %s%c", arguments[i], 0);
  for (char **variable = environ; *variable; variable++) fprintf(info, "env %s%c", *variable, 0);
  while ((entry = readdir(open_files))) {
    char target[256];
    int number = atoi(entry->d_name);
    ssize_t size = readlinkat(dirfd(open_files), entry->d_name, target, sizeof target - 1);
    if (size < 0 || number == fd || number == dirfd(open_files)) continue;
    target[size] = 0;
    fprintf(info, "fd %d %s%c", number, target, 0);
  }
  closedir(open_files);
  if (fclose(info)) leave(53);
}

static void publish(void)
{
  static const char *const ends[] = {".info", ".env", ".msg"}; /* the message last: then the rest is there */
  char from[512], to[512], temporary[16];
  for (int i = 0; dir && i < 3; i++) {
    snprintf(temporary, sizeof temporary, "%s.tmp", ends[i]);
    path_of(from, temporary);
    path_of(to, ends[i]);
    if (rename(from, to)) leave(66);
  }
}

int main(int count, char **arguments)
{
  dir = getenv("STANDIN_DIR");
  if (getenv("STANDIN_AT")) first_read = 1;
  write_info(count, arguments);
  read_message();
  fault("message");
  read_envelope();
  fault("end");
  publish();
  return 0;
}
