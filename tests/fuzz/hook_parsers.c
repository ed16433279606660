/* The parsers of contentfilter-queue, callable with any bytes: by libFuzzer (-DFUZZ=envelope|answer|conf|request), and as
 * a library by tests/fuzz/hook_library.py, which compares them with the daemon's. The product's files are included as they are;
 * where they would end the process or print, this file takes over. */
#include "hook.h"

#include <setjmp.h>

_Noreturn void product_leave(enum status status);
#define leave product_leave
#define say product_say
#include "util.c"
#undef leave
#undef say

static jmp_buf left;
static char said[1024];

_Noreturn void leave(enum status status)
{
  longjmp(left, (int)status + 1);
}

void say(const char *first, ...)
{
  va_list more;
  va_start(more, first);
  said[0] = 0;
  for (const char *part = first; part; part = va_arg(more, const char *))
    strncat(said, part, sizeof said - strlen(said) - 1);
  va_end(more);
}

#include "ask.c"
#include "conf.c"
#include "envelope.c"
#include "store.c"

#include <stdio.h>

int parse_envelope(const char *bytes, size_t size, size_t piece, size_t *used);
int parse_answer(const char *packet, size_t size, const char *body, size_t body_size, uint64_t message_size, char *out,
                 size_t room);
int parse_conf(const char *bytes, size_t size, char *out, size_t room);
size_t make_request(const char *block, size_t size, unsigned attempt, int budget, char *packet);

#define REQUIRE(condition) ((condition) ? (void)0 : __builtin_trap())

/* What envelope_drain does with what comes from descriptor 1, `piece` bytes at a time. `used`: bytes that it keeps. */
int parse_envelope(const char *bytes, size_t size, size_t piece, size_t *used)
{
  struct grammar grammar = {.at = SENDER};
  *used = 0;
  while (grammar.at != COMPLETE) {
    size_t got = size - *used < piece ? size - *used : piece, took;
    if (!got) return grammar.at == AFTER_QUIET ? ST_OK : ST_READ;
    char *copy = memcpy(malloc(got), bytes + *used, got); /* so that a sanitizer sees a byte too many */
    enum status status = envelope_feed(&grammar, copy, got, &took);
    free(copy);
    if (status) return (int)status;
    *used += took;
  }
  return ST_OK;
}

/* Whether the hook believes the answer, and then what it read, as text that ends with NUL. */
int parse_answer(const char *packet, size_t size, const char *body, size_t body_size, uint64_t message_size, char *out,
                 size_t room)
{
  struct answer answer = {0};
  int fd = -1;
  if (body) {
    fd = memfd_create("body", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || write(fd, body, body_size) != (ssize_t)body_size) abort();
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW)) abort();
  }
  bool good = answer_parse(packet, size, fd, message_size, &answer);
  if (fd >= 0) close(fd);
  if (good) {
    size_t at = (size_t)snprintf(out, room, "%d %d %.*s\n", answer.action, answer.reason, (int)answer.text_size, answer.text);
    const char *next = answer.submissions;
    for (unsigned i = 0; i < answer.count; i++) {
      struct submission submission;
      next = submission_at(next, &submission);
      REQUIRE(submission.skip <= message_size);
      uint64_t sum = 0;
      for (size_t n = 0; n < submission.prepend_size; n++) sum = sum * 31 + (unsigned char)submission.prepend[n];
      for (size_t n = 0; n < submission.envelope_size; n++)
        sum = sum * 31 + (unsigned char)(submission.envelope ? submission.envelope[n] : 0);
      if (at < room)
        at += (size_t)snprintf(out + at, room - at, "%llu %zu %lld %llu\n", (unsigned long long)submission.skip,
                               submission.prepend_size, submission.envelope ? (long long)submission.envelope_size : -1LL,
                               (unsigned long long)sum);
    }
    if (body && body_size) munmap((void *)(uintptr_t)answer.submissions, body_size);
  }
  return good;
}

/* 0 and what is in force, or the status and what is said, as text. */
int parse_conf(const char *bytes, size_t size, char *out, size_t room)
{
  struct conf conf = {.socket = "/s", .spool = "/t", .budget_ms = 240000, .memory = 4 << 20};
  char *copy = memcpy(calloc(size + 1, 1), bytes, size);
  int status = setjmp(left);
  if (!status) {
    parse(&conf, "queue.conf", copy);
    size_t at = (size_t)snprintf(out, room, "socket %s\nqueue %s\nspool %s\ndialect %s\nunavailable %s\nbudget %lld\nmemory %llu\n",
                                 conf.socket, conf.queue ? conf.queue : "", conf.spool, dialects[conf.dialect],
                                 choices[conf.accept_unavailable], (long long)conf.budget_ms / 1000,
                                 (unsigned long long)conf.memory);
    for (size_t i = 0; conf.names[i] && at < room; i++)
      at += (size_t)snprintf(out + at, room - at, "environ %s\n", conf.names[i]);
    REQUIRE(strlen(conf.socket) <= 107 && *conf.socket == '/' && *conf.spool == '/');
    REQUIRE(conf.budget_ms >= 1000 && conf.budget_ms <= 3600000 && conf.memory <= 1 << 30);
  } else {
    snprintf(out, room, "%s", said);
    status--;
  }
  free(copy);
  return status;
}

/* The request that goes out with the variables in `block`, each ended with NUL. `packet`: PACKET_MAX bytes. */
size_t make_request(const char *block, size_t size, unsigned attempt, int budget, char *packet)
{
  extern char **environ;
  char **before = environ;
  size_t count = 0;
  char *copy = memcpy(calloc(size + 1, 1), block, size);
  for (size_t at = 0; at < size; at += strlen(copy + at) + 1) count++;
  char **made = calloc(count + 1, sizeof *made);
  count = 0;
  for (size_t at = 0; at < size; at += strlen(copy + at) + 1) made[count++] = copy + at;
  struct conf conf = {.names = {"EXTRA", NULL}};
  environ = made;
  size_t length = write_request(packet, &conf, attempt, budget, 1, 2);
  environ = before;
  free(made);
  free(copy);
  return length;
}

#ifdef FUZZ
static char *copied(const uint8_t *data, size_t size)
{
  return size ? memcpy(malloc(size), data, size) : malloc(1);
}

static inline void fuzz_envelope(const uint8_t *data, size_t size)
{
  size_t whole, used;
  int status = parse_envelope((const char *)data, size, size + 1, &whole);
  for (size_t piece = 1; piece < 20; piece += 3) {
    REQUIRE(parse_envelope((const char *)data, size, piece, &used) == status);
    REQUIRE(status || used == whole);
  }
  char *copy = copied(data, size);
  REQUIRE(envelope_valid(copy, size) <= !status);
  free(copy);
}

static inline void fuzz_answer(const uint8_t *data, size_t size)
{
  static char out[PACKET_MAX];
  if (size < 3) return;
  size_t packet = (size_t)data[1] << 8 | data[2];
  bool apart = data[0] & 1;
  data += 3;
  size -= 3;
  if (!apart || packet > size) packet = size;
  char *first = copied(data, packet), *second = copied(data + packet, size - packet);
  parse_answer(first, packet, apart ? second : NULL, size - packet, 1000, out, sizeof out);
  free(first);
  free(second);
}

static inline void fuzz_conf(const uint8_t *data, size_t size)
{
  static char out[4 * CONF_MAX];
  if (size > CONF_MAX || memchr(data, 0, size)) return; /* conf_load refuses both */
  int status = parse_conf((const char *)data, size, out, sizeof out);
  REQUIRE(status == ST_OK || status == ST_CONF);
}

static inline void fuzz_request(const uint8_t *data, size_t size)
{
  static char packet[PACKET_MAX];
  size_t length = make_request((const char *)data, size, 1, 1000, packet);
  REQUIRE(length >= REQUEST_HEAD && length <= REQUEST_HEAD + ENVIRON_MAX);
  REQUIRE(length == REQUEST_HEAD || !packet[length - 1]);
}

#define JOIN(first, second) first##second
#define NAME(target) JOIN(fuzz_, target)
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  NAME(FUZZ)(data, size);
  return 0;
}
#endif
