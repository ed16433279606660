/* queue.conf: lines of `name value`; `#` starts a comment line. Any error in it is a temporary failure, with the line
 * number on stderr: mail waits until it is corrected. */
#include "hook.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

static const char *const dialects[] = {"auto", "stock", "notqmail", "sagredo", "simscan", "indimail", "sqmail", NULL};
static const char *const choices[] = {"defer", "accept", NULL};

static _Noreturn void wrong(const char *path, unsigned line, const char *name, const char *remedy)
{
  char digits[24];
  put_number(digits, line);
  say(path, ":", digits, ": ", name, ": ", remedy, NULL);
  leave(ST_CONF);
}

static bool number(const char *text, uint64_t min, uint64_t max, uint64_t *to)
{
  uint64_t value = 0;
  if (!*text) return false;
  for (; *text; text++) {
    if (*text < '0' || *text > '9' || value > max) return false;
    value = value * 10 + (uint64_t)(*text - '0');
  }
  *to = value;
  return value >= min && value <= max;
}

static int choice(const char *text, const char *const *list)
{
  for (int i = 0; list[i]; i++)
    if (!strcmp(text, list[i])) return i;
  return -1;
}

/* NULL, or a description of a valid value. */
static const char *set(struct conf *conf, const char *name, const char *value)
{
  uint64_t count = 0;
  if (!strcmp(name, "socket") || !strcmp(name, "queue") || !strcmp(name, "spool")) {
    const char **to = *name == 'q' ? &conf->queue : name[1] == 'o' ? &conf->socket : &conf->spool;
    if (*value != '/') return "give an absolute path";
    if (to == &conf->socket && strlen(value) > 107) return "a socket's path has at most 107 bytes";
    *to = value;
  } else if (!strcmp(name, "dialect")) {
    int found = choice(value, dialects);
    if (found < 0) return "one of auto, stock, notqmail, sagredo, simscan, indimail, sqmail";
    conf->dialect = (enum dialect)found;
  } else if (!strcmp(name, "unavailable")) {
    int found = choice(value, choices);
    if (found < 0) return "defer or accept";
    conf->accept_unavailable = found == 1;
  } else if (!strcmp(name, "budget")) {
    if (!number(value, 1, 3600, &count)) return "seconds, 1 to 3600";
    conf->budget_ms = (int64_t)count * 1000;
  } else if (!strcmp(name, "memory")) {
    if (!number(value, 0, 1 << 30, &conf->memory)) return "bytes, 0 to 1073741824";
  } else if (!strcmp(name, "environ")) {
    while (count < NAMES_MAX && conf->names[count]) count++;
    if (!*value || strpbrk(value, "= \t")) return "the name of one variable";
    if (count == NAMES_MAX) return "at most 64 of these lines";
    conf->names[count] = value;
  } else {
    return "unknown; known are socket, queue, dialect, unavailable, budget, memory, spool, environ";
  }
  return NULL;
}

static void parse(struct conf *conf, const char *path, char *at)
{
  for (unsigned line = 1; *at; line++) {
    char *name = at + strspn(at, " \t");
    char *end = name + strcspn(name, "\n");
    at = *end ? end + 1 : end;
    while (end > name && (end[-1] == ' ' || end[-1] == '\t' || end[-1] == '\r')) end--;
    *end = 0;
    if (!*name || *name == '#') continue;
    char *value = name + strcspn(name, " \t");
    if (*value) *value++ = 0;
    const char *remedy = set(conf, name, value + strspn(value, " \t"));
    if (remedy) wrong(path, line, name, remedy);
  }
}

char *conf_load(struct conf *conf, char *room)
{
  const char *path = getauxval(AT_SECURE) ? NULL : getenv("CONTENTFILTER_QUEUE_CONF");
  if (!path) path = "/etc/contentfilter/queue.conf";
  *conf = (struct conf){.socket = "/run/contentfilter/queue.sock",
                        .spool = "/var/tmp",
                        .budget_ms = 240000,
                        .memory = 4 << 20};
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0 && errno == ENOENT) return room;
  ssize_t size = 0, got = fd < 0 ? -1 : 1;
  while (got > 0 && size <= CONF_MAX) { /* to the end: half a file could have another meaning */
    got = read(fd, room + size, (size_t)(CONF_MAX + 1 - size));
    size += got > 0 ? got : 0;
    if (got < 0 && errno == EINTR) got = 1;
  }
  if (got < 0) {
    int error = errno;
    say(path, ": ", strerror(error), "; everyone who sends mail must be able to read it", NULL);
    leave(status_of(error, ST_CONF));
  }
  close(fd);
  if (size > CONF_MAX) wrong(path, 0, "the file", "at most 16384 bytes");
  room[size] = 0;
  if (strlen(room) != (size_t)size) wrong(path, 0, "the file", "remove the NUL bytes");
  parse(conf, path, room);
  if (conf->dialect == INDIMAIL) say_nothing(); /* its stderr carries the reply */
  return room + size + 1;
}

/* For `--check`: the settings in force, in the format of the file. */
static void line(const char *name, const char *value)
{
  const char *parts[] = {name, " ", value, "\n"};
  for (size_t i = 0; i < 4; i++)
    if (write(1, parts[i], strlen(parts[i])) < 0) leave(ST_WRITE);
}

void conf_print(const struct conf *conf)
{
  char digits[24];
  line("socket", conf->socket);
  if (conf->queue) line("queue", conf->queue);
  line("dialect", dialects[conf->dialect]);
  line("unavailable", choices[conf->accept_unavailable]);
  put_number(digits, (uint64_t)conf->budget_ms / 1000);
  line("budget", digits);
  put_number(digits, conf->memory);
  line("memory", digits);
  line("spool", conf->spool);
  for (size_t i = 0; conf->names[i]; i++) line("environ", conf->names[i]);
}
