/* Client of the daemon: one packet with two descriptors out, one packet back (docs/hook-protocol.md). An answer is
 * validated completely. Anything else counts as no answer, and the same descriptors are offered again until the budget
 * ends, so a restart of the daemon goes unnoticed. */
#include "hook.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum {
  VERSION = 1,
  REQUEST_HEAD = 32,
  ENVIRON_MAX = 32768,
  VALUE_MAX = 1024,
  ANSWER_HEAD = 24,
  SUBMISSION_HEAD = 28,
  FDS_MAX = 4,
};

static uint64_t get(const char *from, int bytes)
{
  uint64_t number = 0;
  while (bytes--) number = number << 8 | (unsigned char)from[bytes];
  return number;
}

static bool starts(const char *text, const char *with)
{
  return !strncmp(text, with, strlen(with));
}

static bool same(const char *variable, size_t name, const char *as)
{
  return !strncmp(variable, as, name) && !as[name];
}

/* Variables that tell where a message comes from, and none that could be a secret. */
static bool wanted(const char *variable, size_t name, const struct conf *conf)
{
  static const char exact[][20] = {"PROTO",  "RELAYCLIENT", "HELOHOST",  "MAILFROM",          "RCPTTO",
                                   "SENDER", "RECIPIENT",   "NEWSENDER", "QMAILAUTHENTICATED"};
  for (size_t i = 0; conf->names[i]; i++)
    if (same(variable, name, conf->names[i])) return true;
  for (size_t i = 0; i < sizeof exact / sizeof *exact; i++)
    if (*variable == *exact[i] && same(variable, name, exact[i])) return true;
  return (starts(variable, "TCP") || starts(variable, "SMTP") || starts(variable, "AUTH")) &&
         !memmem(variable, name, "PASS", 4);
}

/* The budget runs while the connection waits in the socket's queue, hence the time of sending, on the clock that hook
 * and daemon share. It travels as a variable, because a daemon that does not know it ignores it. The canary's own mark
 * counts for such a daemon only without another variable. */
static size_t write_request(char *packet, const struct conf *conf, unsigned attempt, int64_t end, uint64_t message,
                            uint64_t envelope)
{
  extern char **environ;
  char *start = packet + REQUEST_HEAD, *to = start;
  int left = left_ms(end);
  if (!getenv("CONTENTFILTER_CANARY")) to = put_number(stpcpy(to, "CONTENTFILTER_SENT="), (uint64_t)(end - left)) + 1;
  for (char **variable = environ; *variable; variable++) {
    size_t name = strcspn(*variable, "=");
    if (!name || !(*variable)[name] || !wanted(*variable, name, conf)) continue;
    size_t size = name + 1 + strnlen(*variable + name + 1, VALUE_MAX);
    if (size + 1 > (size_t)(start + ENVIRON_MAX - to)) continue;
    to = (char *)mempcpy(to, *variable, size);
    *to++ = 0;
  }
  char *head = put_bytes(mempcpy(packet, "CFQ1", 4), VERSION, 2);
  head = put_bytes(head, attempt, 2);
  head = put_bytes(head, (uint64_t)left, 4);
  head = put_bytes(head, message, 8);
  head = put_bytes(head, envelope, 8);
  put_bytes(head, (uint64_t)(to - start), 4);
  return (size_t)(to - packet);
}

static bool send_request(int connection, char *packet, size_t size, int message, int envelope)
{
  union {
    struct cmsghdr head;
    char room[CMSG_SPACE(2 * sizeof(int))];
  } control = {0};
  struct iovec bytes = {packet, size};
  struct msghdr out = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  int pair[2] = {message, envelope};
  struct cmsghdr *head = CMSG_FIRSTHDR(&out);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof pair);
  memcpy(CMSG_DATA(head), pair, sizeof pair);
  return sendmsg(connection, &out, MSG_NOSIGNAL) == (ssize_t)size;
}

/* The size of the answer, 0 if there is none. At most one descriptor is accepted; all others are closed. */
static size_t receive(int connection, char *packet, int64_t end, int *body)
{
  union {
    struct cmsghdr head;
    char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
  } control;
  struct iovec bytes = {packet, PACKET_MAX};
  struct msghdr in = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  struct pollfd wait = {.fd = connection, .events = POLLIN};
  int ready;
  while ((ready = poll(&wait, 1, left_ms(end))) < 0 && errno == EINTR) {
  }
  if (ready == 0) errno = ETIMEDOUT;
  if (ready <= 0) return 0;
  errno = ECONNRESET;
  ssize_t size = recvmsg(connection, &in, MSG_CMSG_CLOEXEC);
  if (size <= 0) return 0;
  bool usable = !(in.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
  struct cmsghdr *head = CMSG_FIRSTHDR(&in); /* the kernel puts all descriptors into one header */
  size_t count = head && head->cmsg_type == SCM_RIGHTS ? (head->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
  for (size_t i = 0; i < count; i++) {
    if (*body >= 0) close(*body);
    memcpy(body, CMSG_DATA(head) + i * sizeof(int), sizeof *body);
  }
  usable = usable && count <= 1;
  errno = EBADMSG;
  return usable ? (size_t)size : 0;
}

/* Map a body only if it can neither shrink nor change. */
static const char *map_body(int fd, uint64_t size)
{
  const int needed = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
  struct stat about;
  int seals = fcntl(fd, F_GET_SEALS);
  if (seals == -1 || (seals & needed) != needed || fstat(fd, &about) || (uint64_t)about.st_size != size || !size)
    return NULL;
  void *bytes = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
  return bytes == MAP_FAILED ? NULL : bytes;
}

const char *submission_at(const char *at, struct submission *submission)
{
  bool received = get(at, 4) != 0;
  const char *prepend = at + SUBMISSION_HEAD, *envelope = prepend + get(at + 12, 8);
  *submission = (struct submission){.prepend = prepend,
                                    .prepend_size = (size_t)get(at + 12, 8),
                                    .envelope = received ? NULL : envelope,
                                    .envelope_size = (size_t)get(at + 20, 8),
                                    .skip = get(at + 4, 8)};
  return envelope + submission->envelope_size;
}

static bool check_submissions(const char *at, uint64_t left, uint64_t message_size, unsigned count)
{
  for (; count; count--) {
    if (left < SUBMISSION_HEAD) return false;
    uint64_t flags = get(at, 4), skip = get(at + 4, 8), prepend = get(at + 12, 8), envelope = get(at + 20, 8);
    at += SUBMISSION_HEAD;
    left -= SUBMISSION_HEAD;
    if (flags > 1 || skip > message_size || prepend > left || envelope > left - prepend) return false;
    if (flags ? envelope != 0 : !envelope_valid(at + prepend, (size_t)envelope)) return false;
    at += prepend + envelope;
    left -= prepend + envelope;
  }
  return !left;
}

static bool answer_parse(const char *from, size_t size, int body, uint64_t message_size, struct answer *answer)
{
  if (size < ANSWER_HEAD || memcmp(from, "CFA1", 4) || get(from + 4, 2) != VERSION) return false;
  uint64_t action = get(from + 6, 1), reason = get(from + 7, 1), text = get(from + 8, 2), count = get(from + 10, 2);
  uint64_t flags = get(from + 12, 1), length = get(from + 16, 8), inside = flags ? 0 : length;
  if (action < QUEUE || action > DROP || reason > TOO_BIG || flags > 1 || flags != (body >= 0)) return false;
  if (text > TEXT_MAX || text + ANSWER_HEAD > size || inside != size - ANSWER_HEAD - text) return false;
  if (action == QUEUE ? !count || count > SUBMISSIONS_MAX : count || length) return false;
  answer->action = (enum action)action;
  answer->reason = (enum reason)reason;
  answer->text = from + ANSWER_HEAD;
  answer->text_size = (size_t)text;
  answer->count = (unsigned)count;
  for (size_t i = 0; i < text; i++)
    if (answer->text[i] < ' ' || answer->text[i] > '~') return false;
  answer->submissions = flags ? map_body(body, length) : answer->text + text;
  if (!answer->submissions) return false;
  bool sound = check_submissions(answer->submissions, length, message_size, answer->count);
  if (!sound && flags) munmap((void *)(uintptr_t)answer->submissions, (size_t)length); /* the next one maps its own */
  return sound;
}

/* A full listen queue: the daemon is busy, not gone. The kernel lets those that wait for room in first come, first
 * served; a hook that came back from time to time would lose to a flood of connections that comes back more often. */
static bool reach(int connection, const struct sockaddr_un *to, int64_t end)
{
  int left = left_ms(end) + 1; /* 0 would be without limit */
  struct timeval wait = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000};
  return !setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait) &&
         !connect(connection, (const struct sockaddr *)to, sizeof *to) && !fcntl(connection, F_SETFL, O_NONBLOCK);
}

/* One attempt. */
static bool offer(const struct conf *conf, unsigned attempt, const struct store *message, const struct store *envelope,
                  int64_t end, char *packet, struct answer *answer)
{
  struct sockaddr_un to = {.sun_family = AF_UNIX};
  int body = -1;
  int connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (connection < 0) return false;
  memcpy(to.sun_path, conf->socket, strlen(conf->socket));
  if (reach(connection, &to, end)) {
    size_t size = write_request(packet, conf, attempt, end, message->size, envelope->size);
    if (send_request(connection, packet, size, message->shared, envelope->shared) &&
        (size = receive(connection, packet, end, &body)) &&
        answer_parse(packet, size, body, message->size, answer)) {
      if (body >= 0) close(body); /* the mapping remains */
      answer->connection = connection;
      return true;
    }
  }
  int error = errno;
  if (body >= 0) close(body);
  close(connection);
  errno = error;
  return false;
}

bool ask(const struct conf *conf, const struct store *message, const struct store *envelope, int64_t end,
         char *packet, struct answer *answer)
{
  int pause = 10;
  for (unsigned attempt = 0;; attempt++) {
    if (offer(conf, attempt < UINT16_MAX ? attempt : UINT16_MAX, message, envelope, end, packet, answer))
      return true;
    int error = errno, left = left_ms(end);
    if (!left) {
      say("no answer from ", conf->socket, ": ", strerror(error), "; is `contentfilter serve` running?", NULL);
      return false;
    }
    /* Jitter, so that waiting hooks do not all retry at the same moment. */
    int jitter = (int)((unsigned)getpid() * 7919u + (unsigned)now_ms()) % (pause / 2);
    jitter = jitter < 0 ? -jitter : jitter;
    poll(NULL, 0, pause + jitter < left ? pause + jitter : left);
    pause = pause < 500 ? pause * 2 : 1000;
  }
}
