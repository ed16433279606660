/* Several submissions, all or nothing: one real qmail-queue for each. All are fed, but the final NUL of every envelope
 * is held back until each of them has consumed the rest. Until then closing the pipes undoes everything: a qmail-queue
 * whose envelope is incomplete cleans up and exits with 54.
 *
 * The envelope pipes are one page long, so "writable" means "empty": the child has read all it was given. */
#include "hook.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef GRACE_MS /* shorter in the tests */
#define GRACE_MS 30000
#define ABORT_MS 5000
#endif

enum { PAGE = 4096, NEVER_STARTED = -1000 };

struct part {
  struct submission submission;
  pid_t pid;             /* 0: not running */
  int message, envelope; /* ends to write to, -1 when closed */
  uint64_t given;        /* bytes written so far, of the message, then of the envelope */
  int result;            /* exit status, or minus the signal */
  bool ready, committed;
};

struct all {
  const struct conf *conf;
  const struct store *message, *envelope;
  struct part parts[SUBMISSIONS_MAX];
  unsigned count;
  void (*pipe_signal)(int); /* the caller's; restored in the children */
};

static void shut(int *fd)
{
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

static _Noreturn void child(const struct all *all, int message, int envelope, const sigset_t *mask)
{
  if (dup2(message, 0) != 0 || dup2(envelope, 1) != 1) leave(ST_MEMORY);
  /* The caller reads its error pipe to end of file before it waits, so no copy of the other end may remain here. */
  if (syscall(SYS_close_range, 3U, ~0U, 0U))
    for (int fd = 3; fd < 1024; fd++) close(fd);
  signal(SIGPIPE, all->pipe_signal);
  sigprocmask(SIG_SETMASK, mask, NULL);
  start_queue(all->conf, 0, 1);
}

static bool start(struct all *all, struct part *part, const sigset_t *mask)
{
  int message[2], envelope[2];
  if (pipe2(message, O_CLOEXEC)) return false;
  if (pipe2(envelope, O_CLOEXEC)) {
    close(message[0]);
    close(message[1]);
    return false;
  }
  part->message = message[1];
  part->envelope = envelope[1];
  bool done = fcntl(envelope[1], F_SETPIPE_SZ, PAGE) >= 0 && !fcntl(envelope[1], F_SETFL, O_NONBLOCK) &&
              !fcntl(message[1], F_SETFL, O_NONBLOCK);
  pid_t pid = done ? fork() : -1;
  if (!pid) child(all, message[0], envelope[0], mask);
  if (pid > 0) part->pid = pid;
  close(message[0]);
  close(envelope[0]);
  return pid > 0;
}

static bool again(ssize_t done)
{
  return done > 0 || (done < 0 && (errno == EAGAIN || errno == EINTR));
}

static bool give_message(const struct all *all, struct part *part)
{
  const struct submission *submission = &part->submission;
  uint64_t size = submission->prepend_size + (all->message->size - submission->skip);
  ssize_t done = 1;
  if (part->given < submission->prepend_size) {
    done = write(part->message, submission->prepend + part->given, submission->prepend_size - part->given);
  } else if (part->given < size) {
    loff_t at = (loff_t)(submission->skip + part->given - submission->prepend_size);
    done = splice(all->message->fd, &at, part->message, NULL, size - part->given < CHUNK ? size - part->given : CHUNK,
                  SPLICE_F_NONBLOCK);
  } else {
    shut(&part->message);
    part->given = 0;
    return true;
  }
  if (done > 0) part->given += (uint64_t)done;
  return again(done);
}

/* Called when the pipe is empty. */
static bool give_envelope(const struct all *all, struct part *part)
{
  char page[PAGE];
  const char *from = part->submission.envelope;
  uint64_t size = (from ? part->submission.envelope_size : all->envelope->size) - 1;
  size_t next = size - part->given < PAGE ? (size_t)(size - part->given) : PAGE;
  int unread = 0;
  if (ioctl(part->envelope, FIONREAD, &unread) || unread) return true;
  part->ready = !next;
  if (!next) return true;
  if (from) {
    from += part->given;
  } else {
    if (pread(all->envelope->fd, page, next, (off_t)part->given) != (ssize_t)next) return false;
    from = page;
  }
  ssize_t done = write(part->envelope, from, next);
  if (done > 0) part->given += (uint64_t)done;
  return again(done);
}

/* ST_OK when every part has consumed its input. `gone` is set to the part that failed, if one did. */
static enum status feed(struct all *all, int64_t end, const struct part **gone)
{
  struct pollfd waits[SUBMISSIONS_MAX];
  for (;;) {
    unsigned ready = 0;
    for (unsigned i = 0; i < all->count; i++) {
      struct part *part = &all->parts[i];
      waits[i].fd = part->message >= 0 ? part->message : part->envelope;
      waits[i].events = part->ready ? 0 : POLLOUT;
      ready += part->ready;
    }
    /* Even when all are ready: check once more that they are still running. */
    int woken = poll(waits, all->count, ready == all->count ? 0 : left_ms(end));
    if (!woken) return ready == all->count ? ST_OK : ST_TIMEOUT;
    for (unsigned i = 0; woken > 0 && i < all->count; i++) {
      struct part *part = &all->parts[i];
      if (!waits[i].revents) continue;
      *gone = part;
      if (waits[i].revents != POLLOUT) return ST_BUG;
      if (part->message >= 0 ? !give_message(all, part) : !give_envelope(all, part)) return ST_BUG;
      *gone = NULL;
    }
  }
}

/* True if all have ended, false if the time is up. */
static bool reap(struct all *all, int64_t end)
{
  sigset_t child_signal;
  sigemptyset(&child_signal);
  sigaddset(&child_signal, SIGCHLD);
  for (;;) {
    unsigned running = 0;
    for (unsigned i = 0; i < all->count; i++) {
      struct part *part = &all->parts[i];
      int status;
      if (part->pid && waitpid(part->pid, &status, WNOHANG) == part->pid) {
        part->pid = 0;
        part->result = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
      }
      running += part->pid != 0;
    }
    int left = left_ms(end);
    if (!running || !left) return !running;
    struct timespec wait = {left / 1000, left % 1000 * 1000000L};
    sigtimedwait(&child_signal, NULL, &wait); /* blocked since before the first fork, so none is missed */
  }
}

/* Exit status for the whole message after a part has failed. Only a documented status of qmail-queue may reject
 * permanently. 0 before the commit is no success: the part cannot have seen the end of its envelope. */
static enum status meaning(int result)
{
  if (result == ST_ADDRESS || (result >= ST_REJECT && result <= ST_SQ_BANNED)) return (enum status)result;
  if ((result >= ST_MEMORY && result <= 74) || result == ST_BUG || result == ST_GRAMMAR || result == ST_NO_EXEC)
    return (enum status)result;
  return result <= 0 ? ST_BUG : ST_DEFER;
}

static void abort_all(struct all *all)
{
  for (unsigned i = 0; i < all->count; i++) {
    shut(&all->parts[i].message);
    shut(&all->parts[i].envelope);
  }
  if (reap(all, now_ms() + ABORT_MS)) return;
  for (unsigned i = 0; i < all->count; i++)
    if (all->parts[i].pid) kill(all->parts[i].pid, SIGKILL);
  reap(all, now_ms() + ABORT_MS);
}

/* If one NUL cannot be written (no page for the pipe, say), the rest are not tried: the caller retries the whole
 * message anyway, and a part that is not queued now will not be delivered twice. */
static void commit(struct all *all)
{
  bool going = true;
  for (unsigned i = 0; i < all->count; i++) {
    ssize_t wrote = -1;
    while (going && (wrote = write(all->parts[i].envelope, "", 1)) < 0 && errno == EINTR) {
    }
    all->parts[i].committed = going = wrote == 1;
    shut(&all->parts[i].envelope);
  }
}

static void report(const struct all *all, int connection)
{
  char packet[8 + 8 * SUBMISSIONS_MAX] = "CFR1\1", *to = packet + 6;
  to = put_bytes(to, all->count, 2);
  for (unsigned i = 0; i < all->count; i++) {
    to = put_bytes(to, (uint64_t)all->parts[i].result, 4);
    to = put_bytes(to, all->parts[i].committed, 4);
  }
  if (send(connection, packet, (size_t)(to - packet), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return; /* best effort */
}

/* A failure after the commit cannot be undone. The status is temporary: delivered twice is better than never. */
static enum status after_commit(const struct all *all)
{
  char text[400], done[24], of[24], *to = text;
  enum status status = ST_OK;
  unsigned queued = 0;
  for (unsigned i = 0; i < all->count; i++) {
    int result = all->parts[i].result;
    if (!result && !all->parts[i].committed) result = ST_BUG;
    queued += !result;
    if (!result) continue;
    if (!status) status = result > 0 && result < ST_MEMORY ? ST_DEFER : meaning(result);
    if (to - text > 340) continue;
    to = stpcpy(put_number(stpcpy(to, to > text ? ", " : ""), i + 1), result < 0 ? " by signal " : " with status ");
    to = put_number(to, (uint64_t)(result < 0 ? -result : result));
  }
  put_number(done, queued);
  put_number(of, all->count);
  if (status)
    say(done, " of ", of, " parts are queued, not queued: ", text, "; the client will retry the whole message", NULL);
  return status;
}

enum status submit_all(const struct conf *conf, const struct store *message, const struct store *envelope,
                       const struct answer *answer, int64_t end)
{
  struct all all;
  const char *at = answer->submissions;
  const struct part *gone = NULL;
  enum status status = ST_OK;
  sigset_t blocked, mask;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGCHLD);
  sigprocmask(SIG_BLOCK, &blocked, &mask);
  signal(SIGCHLD, SIG_DFL); /* if the caller ignored it, there would be no exit statuses */

  all = (struct all){.conf = conf, .message = message, .envelope = envelope, .count = answer->count};
  all.pipe_signal = signal(SIGPIPE, SIG_IGN);
  for (unsigned i = 0; i < all.count; i++) {
    all.parts[i] = (struct part){.message = -1, .envelope = -1, .result = NEVER_STARTED};
    at = submission_at(at, &all.parts[i].submission);
  }
  for (unsigned i = 0; i < all.count && !status; i++)
    if (!start(&all, &all.parts[i], &mask)) status = ST_MEMORY;
  /* Even an answer in the last second leaves enough time for the disk. */
  int64_t grace = now_ms() + GRACE_MS;
  if (!status) status = feed(&all, end > grace ? end : grace, &gone);
  if (status) {
    abort_all(&all);
    if (gone) status = meaning(gone->result);
  } else {
    commit(&all);
    reap(&all, end > grace ? end : grace);
    for (unsigned i = 0; i < all.count; i++)
      if (all.parts[i].pid) all.parts[i].result = ST_TIMEOUT; /* it may still finish */
    status = after_commit(&all);
  }
  report(&all, answer->connection);
  return status;
}
