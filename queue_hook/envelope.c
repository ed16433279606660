/* Parser of qmail-queue's envelope: F sender NUL, T recipient NUL for each recipient, and a final NUL. Incremental, in
 * one pass, for any length. Bytes after the final NUL are ignored.
 *
 * SPAMCONTROL and s/qmail may add a record Q ("no base64 seen"). Some callers end it with its own NUL, others only with
 * the final one; so after an empty Q end of file counts as the final NUL. */
#include "hook.h"

#include <string.h>

enum status envelope_feed(struct grammar *grammar, const char *bytes, size_t size, size_t *used)
{
  const char *at = bytes, *end = bytes + size;
  enum status status = ST_OK;
  while (at < end && grammar->at != COMPLETE) {
    if (grammar->at == INSIDE || grammar->at == QUIET) {
      const char *nul = memchr(at, 0, (size_t)(end - at));
      size_t length = (size_t)((nul ? nul : end) - at);
      if (length > ADDRESS_MAX - grammar->length) {
        status = ST_ADDRESS;
        break;
      }
      grammar->length += (unsigned)length;
      at += length;
      if (!nul) break;
      at++;
      grammar->at = grammar->at == QUIET && !grammar->length ? AFTER_QUIET : BETWEEN;
    } else {
      char letter = *at++;
      grammar->length = 0;
      if (grammar->at == SENDER ? letter == 'F' : letter == 'T')
        grammar->at = INSIDE;
      else if (grammar->at != SENDER && letter == 'Q')
        grammar->at = QUIET;
      else if (grammar->at != SENDER && !letter)
        grammar->at = COMPLETE;
      else {
        status = ST_GRAMMAR;
        break;
      }
    }
  }
  *used = (size_t)(at - bytes);
  return status;
}

void envelope_drain(struct store *store, int from, const struct conf *conf)
{
  struct grammar grammar = {.at = SENDER};
  while (grammar.at != COMPLETE) {
    size_t room, used;
    char *to = store_room(store, &room, conf);
    size_t got = read_some(from, to, room);
    if (!got && grammar.at == AFTER_QUIET) return;
    if (!got) leave(ST_READ);
    enum status status = envelope_feed(&grammar, to, got, &used);
    if (status) leave(status);
    store_took(store, used);
  }
}

bool envelope_valid(const char *bytes, size_t size)
{
  struct grammar grammar = {.at = SENDER};
  size_t used;
  return !envelope_feed(&grammar, bytes, size, &used) && grammar.at == COMPLETE && used == size;
}
