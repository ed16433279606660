/* Becoming the real qmail-queue: in the same process, so that "qp PID" in the caller's reply is right, and as the same
 * user, so that its Received line is right. */
#include "hook.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* PID.COUNT of the last pass. The real qmail-queue starts no program, so mail never inherits this; a wrapper in its
 * place that leads back here does, as the same process or as its child. A wrapper that sends other mail on the way is
 * not a loop, hence the count. */
#define MARK "CONTENTFILTER_QUEUE_PASS="
enum { PASSES_MAX = 8 };

static unsigned long passes;

void check_pass(void)
{
  const char *mark = getenv("CONTENTFILTER_QUEUE_PASS");
  char *end;
  if (!mark) return;
  unsigned long pid = strtoul(mark, &end, 10);
  passes = *end == '.' ? strtoul(end + 1, NULL, 10) : 0;
  if (pid == (unsigned long)getpid() || pid == (unsigned long)getppid() || passes >= PASSES_MAX) {
    say("a loop: the program that `queue` in queue.conf names leads back to this one; name the real qmail-queue", NULL);
    leave(ST_BUG);
  }
}

void check_queue(struct conf *conf)
{
  struct stat target, self;
  if (!conf->queue) conf->queue = "/var/qmail/bin/qmail-queue.real";
  if (stat(conf->queue, &target)) {
    say(conf->queue, ": ", strerror(errno), "; set `queue` in queue.conf to the real qmail-queue", NULL);
    leave(ST_NO_EXEC);
  }
  if (!stat("/proc/self/exe", &self) && self.st_dev == target.st_dev && self.st_ino == target.st_ino) {
    say(conf->queue, ": is this program; set `queue` in queue.conf to the real qmail-queue", NULL);
    leave(ST_CONF);
  }
}

_Noreturn void start_queue(const struct conf *conf, int message, int envelope)
{
  extern char **environ;
  char mark[64];
  size_t count = 0, kept = 0;
  while (environ[count]) count++;
  char *environment[count + 2]; /* the kernel limits it to a quarter of the stack */
  for (size_t i = 0; i < count; i++)
    if (strncmp(environ[i], MARK, sizeof MARK - 1)) environment[kept++] = environ[i];
  put_number(stpcpy(put_number(stpcpy(mark, MARK), (uint64_t)getpid()), "."), passes + 1);
  environment[kept++] = mark;
  environment[kept] = NULL;

  if (dup2(message, 0) == 0 && dup2(envelope, 1) == 1) {
    char *arguments[] = {(char *)(uintptr_t)conf->queue, NULL}; /* execve does not write to it */
    execve(conf->queue, arguments, environment);
  }
  say(conf->queue, ": ", strerror(errno), NULL);
  leave(ST_NO_EXEC);
}

_Noreturn void submit_one(const struct conf *conf, const struct store *message, const struct store *envelope,
                          const struct submission *submission)
{
  int body = store_source(submission->prepend, submission->prepend_size, message, submission->skip, conf);
  int addresses = submission->envelope
                      ? store_source(submission->envelope, submission->envelope_size, NULL, 0, conf)
                      : store_source(NULL, 0, envelope, 0, conf);
  start_queue(conf, body, addresses);
}
