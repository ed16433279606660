/* Declarations shared by the parts of contentfilter-queue. The order of work is in main.c. */
#ifndef HOOK_H
#define HOOK_H

#ifndef _GNU_SOURCE /* memfd_create, splice, pipe2: included first, so that a plain `cc *.c` works too */
#define _GNU_SOURCE
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "status.h"

#ifndef CONTENTFILTER_VERSION
#define CONTENTFILTER_VERSION "0.1.0"
#endif

enum {
  CHUNK = 65536,         /* bytes per read; a message that is no larger also stays in memory */
  CONF_MAX = 16384,      /* of queue.conf */
  PACKET_MAX = 65536,
  ADDRESS_MAX = 1002,    /* qmail-queue's limit */
  SUBMISSIONS_MAX = 128, /* each is one process and two pipes */
  TEXT_MAX = 250,
  NAMES_MAX = 64, /* `environ` lines */
};

/* util.c */
int64_t now_ms(void);     /* monotonic clock */
int left_ms(int64_t end); /* milliseconds until `end`, 0 if it has passed; fits poll() */
size_t read_some(int fd, char *to, size_t room); /* 0 at end of file; exits on error */
void say(const char *first, ...);                 /* one line on stderr; the last argument is NULL */
void say_nothing(void);                           /* from now on stderr belongs to the dialect */
char *put_number(char *to, uint64_t number);           /* decimal with a final NUL; returns the address of the NUL */
char *put_bytes(char *to, uint64_t number, int bytes); /* little-endian */
_Noreturn void leave(enum status status);
enum status status_of(int error, enum status otherwise); /* errno -> ST_MEMORY or `otherwise` */

/* conf.c */
enum dialect { AUTO, STOCK, NOTQMAIL, SAGREDO, SIMSCAN, INDIMAIL, SQMAIL };

struct conf {
  const char *socket, *queue, *spool;
  enum dialect dialect;
  bool accept_unavailable;
  int64_t budget_ms;
  uint64_t memory;
  const char *names[NAMES_MAX + 1]; /* additional variables for the daemon */
};

char *conf_load(struct conf *conf, char *room); /* returns the end of what it uses of `room` */
void conf_print(const struct conf *conf);

/* store.c: a message or an envelope, in a memfd or, if larger than conf.memory, in an unnamed file */
struct store {
  int fd;
  int shared; /* for the daemon: sealed like `fd`, or read-only */
  bool on_disk;
  uint64_t size; /* all bytes */
  size_t fill;   /* bytes in `bytes` that are not yet in the file */
  char *bytes;   /* CHUNK bytes; holds everything while size <= CHUNK */
};

void store_init(struct store *store, char *bytes);
char *store_end(const struct store *store); /* end of what it uses of `bytes`, when it is complete */
void store_drain(struct store *store, int from, const struct conf *conf); /* reads to end of file */
char *store_room(struct store *store, size_t *room, const struct conf *conf); /* for the next *room bytes */
void store_took(struct store *store, size_t size);                            /* that many bytes were put there */
void store_finish(struct store *store, const struct conf *conf); /* everything is in the file; sets `shared` */
/* A descriptor from which `head`, followed by the store's bytes from `skip` on, can be read once. */
int store_source(const char *head, size_t size, const struct store *tail, uint64_t skip, const struct conf *conf);

/* envelope.c */
struct grammar {
  enum { SENDER, BETWEEN, INSIDE, QUIET, AFTER_QUIET, COMPLETE } at;
  unsigned length; /* of the current address */
};

enum status envelope_feed(struct grammar *grammar, const char *bytes, size_t size, size_t *used);
void envelope_drain(struct store *store, int from, const struct conf *conf);
bool envelope_valid(const char *bytes, size_t size);

/* ask.c */
enum action { QUEUE = 1, REJECT, DEFER, DROP };
enum reason { NO_REASON, VIRUS, SPAM, BANNED, TOO_BIG };

struct submission {
  const char *prepend, *envelope; /* envelope NULL: the one received */
  size_t prepend_size, envelope_size;
  uint64_t skip;
};

struct answer {
  enum action action;
  enum reason reason;
  const char *text;
  size_t text_size;
  unsigned count;          /* of submissions */
  const char *submissions; /* all have been checked */
  int connection;
};

/* False if the budget ended without a usable answer. `packet`: PACKET_MAX bytes, which the answer refers to. */
bool ask(const struct conf *conf, const struct store *message, const struct store *envelope, int64_t end,
         char *packet, struct answer *answer);
const char *submission_at(const char *at, struct submission *submission); /* returns the address of the next one */

/* submit.c: the real qmail-queue */
void check_pass(void);               /* exits if this message has been here before */
void check_queue(struct conf *conf); /* sets the default program; exits if it is this one */
_Noreturn void start_queue(const struct conf *conf, int message, int envelope); /* in this process */
_Noreturn void submit_one(const struct conf *conf, const struct store *message, const struct store *envelope,
                          const struct submission *submission);

/* commit.c: several qmail-queues, all or nothing */
enum status submit_all(const struct conf *conf, const struct store *message, const struct store *envelope,
                       const struct answer *answer, int64_t end);

/* dialect.c */
enum status refuse(const struct conf *conf, bool permanent, enum reason reason, const char *text, size_t size);

#endif
