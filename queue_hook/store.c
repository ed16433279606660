/* Storage of a message or an envelope during the check: a memfd or, if larger than conf.memory, an unnamed file.
 * Nothing is left behind however this program ends. The daemon gets a descriptor that cannot change what is queued
 * (store_finish). All offsets are explicit, because the position of a memfd is shared with it. */
#include "hook.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

static int open_unnamed(const struct conf *conf)
{
  int fd = open(conf->spool, O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0400); /* O_EXCL: it can never get a name */
  if (fd < 0) {
    int error = errno;
    say("no unnamed file in ", conf->spool, ": ", strerror(error), "; set `spool` in queue.conf", NULL);
    leave(status_of(error, ST_WRITE));
  }
  return fd;
}

static int open_memory(void)
{
  int fd = memfd_create("contentfilter", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 && errno != ENOSYS) leave(status_of(errno, ST_WRITE));
  return fd;
}

/* A kernel without memfd costs speed, not mail. */
static int open_for(uint64_t size, const struct conf *conf, bool *on_disk)
{
  if (size <= conf->memory) {
    int fd = open_memory();
    if (fd >= 0) return fd;
  }
  *on_disk = true;
  return open_unnamed(conf);
}

static void write_all(int fd, const char *from, size_t size)
{
  while (size) {
    ssize_t wrote = write(fd, from, size);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) leave(status_of(errno, ST_WRITE));
    from += wrote;
    size -= (size_t)wrote;
  }
}

static void copy_all(int to, int from, off_t offset, uint64_t size)
{
  while (size) {
    ssize_t sent = sendfile(to, from, &offset, size < INT32_MAX / 2 ? (size_t)size : INT32_MAX / 2);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) leave(status_of(errno, ST_WRITE));
    size -= (uint64_t)sent;
  }
}

void store_init(struct store *store, char *bytes)
{
  *store = (struct store){.fd = -1, .bytes = bytes};
}

static void flush(struct store *store, const struct conf *conf)
{
  if (store->fd < 0) {
    store->fd = open_for(store->size, conf, &store->on_disk);
  } else if (!store->on_disk && store->size > conf->memory) {
    int disk = open_unnamed(conf);
    copy_all(disk, store->fd, 0, store->size - store->fill);
    close(store->fd);
    store->fd = disk;
    store->on_disk = true;
  }
  write_all(store->fd, store->bytes, store->fill);
  store->fill = 0;
}

char *store_room(struct store *store, size_t *room, const struct conf *conf)
{
  if (store->fill == CHUNK) flush(store, conf);
  *room = CHUNK - store->fill;
  return store->bytes + store->fill;
}

void store_took(struct store *store, size_t size)
{
  store->fill += size;
  store->size += size;
}

char *store_end(const struct store *store)
{
  return store->bytes + (store->size < CHUNK ? store->size : CHUNK);
}

void store_drain(struct store *store, int from, const struct conf *conf)
{
  for (;;) {
    size_t room;
    char *to = store_room(store, &room, conf);
    size_t got = read_some(from, to, room);
    if (!got) return;
    store_took(store, got);
  }
}

/* A read-only descriptor with a position of its own; -1 without /proc. */
static int open_again(int fd)
{
  char path[40];
  put_number(stpcpy(path, "/proc/self/fd/"), (uint64_t)fd);
  return open(path, O_RDONLY | O_CLOEXEC);
}

void store_finish(struct store *store, const struct conf *conf)
{
  if (store->fill || store->fd < 0) flush(store, conf);
  store->shared = store->on_disk ? open_again(store->fd) : store->fd;
  if (store->shared < 0) { /* sealed memory instead, however large */
    store->shared = open_memory();
    if (store->shared < 0) leave(ST_WRITE);
    copy_all(store->shared, store->fd, 0, store->size);
    close(store->fd);
    store->fd = store->shared;
    store->on_disk = false;
  }
  if (!store->on_disk && fcntl(store->fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
    leave(ST_BUG);
}

/* A pipe that is filled before its reader starts, the store's pages without a copy: cheaper than a second file. -1: it
 * does not fit, because of the system's limit or of the number of pipes that this user has. */
static int filled_pipe(const char *head, size_t size, const struct store *tail, uint64_t skip)
{
  enum { PAGE = 4096, PAGES_MAX = 256 }; /* the most that a user may have in one pipe */
  uint64_t rest = tail ? tail->size - skip : 0;
  uint64_t pages = (size + PAGE - 1) / PAGE + (skip % PAGE + rest + PAGE - 1) / PAGE;
  off_t at = (off_t)skip;
  int ends[2];
  if (pages > PAGES_MAX) return -1;
  if (pipe2(ends, O_CLOEXEC)) leave(status_of(errno, ST_WRITE));
  bool fits = pages < 2 || /* the minimum */
              fcntl(ends[1], F_GETPIPE_SZ) >= (int)pages * PAGE ||
              fcntl(ends[1], F_SETPIPE_SZ, (int)pages * PAGE) >= (int)pages * PAGE;
  if (fits && size && write(ends[1], head, size) != (ssize_t)size) leave(ST_WRITE);
  while (fits && rest) {
    ssize_t moved = splice(tail->fd, &at, ends[1], NULL, (size_t)rest, SPLICE_F_NONBLOCK);
    if (moved > 0) rest -= (uint64_t)moved;
    fits = moved > 0;
  }
  close(ends[1]);
  if (fits) return ends[0];
  close(ends[0]);
  return -1;
}

int store_source(const char *head, size_t size, const struct store *tail, uint64_t skip, const struct conf *conf)
{
  uint64_t rest = tail ? tail->size - skip : 0;
  bool on_disk = false;
  int fd = filled_pipe(head, size, tail, skip);
  if (fd >= 0) return fd;
  fd = open_for(size + rest, conf, &on_disk);
  write_all(fd, head, size);
  if (rest) copy_all(fd, tail->fd, (off_t)skip, rest);
  if (lseek(fd, 0, SEEK_CUR) != (off_t)(size + rest) || lseek(fd, 0, SEEK_SET)) leave(ST_WRITE);
  return fd;
}
