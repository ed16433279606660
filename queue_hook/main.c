/* contentfilter-queue replaces qmail-queue. It reads a message (fd 0) and an envelope (fd 1), asks the daemon for a
 * decision, and then becomes the real qmail-queue or exits with a status.
 *
 * Nothing is acknowledged before the real qmail-queue has exited 0. A caller that goes away (an envelope without its
 * final NUL) is noticed before the daemon is asked. Every fault is a temporary status. */
#include "hook.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#ifndef READING_S       /* shorter in the tests */
#define READING_S 86400 /* as qmail-queue's alarm: less than the 36 hours after which qmail cleans up */
#endif

/* queue.conf, message, envelope and packet are read into this, one after the other and each only as long as it is,
 * because the first access to a page costs more than ten system calls. Common: placed next to pages in use anyway. */
char room[CONF_MAX + 1 + 2 * CHUNK + PACKET_MAX] __attribute__((common));

static void too_late(int number)
{
  (void)number;
  leave(ST_TIMEOUT);
}

/* Descriptors 0 to 2 must be open, so that no file opened here gets one of these numbers. */
static void take_low_descriptors(void)
{
  if (fcntl(0, F_GETFD) == -1 || fcntl(1, F_GETFD) == -1) leave(ST_READ);
  if (fcntl(2, F_GETFD) == -1 && open("/dev/null", O_WRONLY) != 2) leave(ST_MEMORY);
}

static void answer_arguments(const char *argument, struct conf *conf)
{
  static const char version[] = "contentfilter-queue " CONTENTFILTER_VERSION " protocol 1\n";
  if (!strcmp(argument, "--version")) leave(write(1, version, sizeof version - 1) < 0 ? ST_WRITE : ST_OK);
  if (!strcmp(argument, "--check")) {
    conf_load(conf, room);
    conf_print(conf);
    leave(ST_OK);
  }
}

int main(int count, char **arguments)
{
  static const char unchecked[] = "X-ContentFilter: unavailable; virus=unchecked; spam=unchecked\n";
  const struct submission unscanned = {.prepend = unchecked, .prepend_size = sizeof unchecked - 1};
  struct store message, envelope;
  struct answer answer;
  struct submission submission;
  struct conf conf;

  take_low_descriptors();
  if (count > 1) answer_arguments(arguments[1], &conf); /* qmail gives none */
  char *at = conf_load(&conf, room);
  check_pass();
  check_queue(&conf);

  signal(SIGALRM, too_late);
  alarm(READING_S);
  store_init(&message, at);
  store_drain(&message, 0, &conf);
  int64_t end = now_ms() + conf.budget_ms;
  store_init(&envelope, store_end(&message));
  envelope_drain(&envelope, 1, &conf);
  alarm(0);
  store_finish(&message, &conf);
  store_finish(&envelope, &conf);

  if (!ask(&conf, &message, &envelope, end, store_end(&envelope), &answer)) {
    static const char text[] = "content filter not available, try again later (#4.3.0)";
    if (conf.accept_unavailable) submit_one(&conf, &message, &envelope, &unscanned);
    leave(refuse(&conf, false, NO_REASON, text, sizeof text - 1));
  }
  if (answer.action == DROP) leave(ST_OK);
  if (answer.action != QUEUE)
    leave(refuse(&conf, answer.action == REJECT, answer.reason, answer.text, answer.text_size));
  submission_at(answer.submissions, &submission);
  if (answer.count == 1) submit_one(&conf, &message, &envelope, &submission);
  leave(submit_all(&conf, &message, &envelope, &answer, end));
}
