/* All exit statuses of this program. Callers turn 11, 31 to 40 and 115 into a permanent rejection and the rest into a
 * temporary failure (qmail-queue(8)), so the status must never come from an errno or by accident. */
#ifndef STATUS_H
#define STATUS_H

enum status {
  ST_OK = 0,
  ST_ADDRESS = 11,   /* an envelope address over 1002 bytes */
  ST_REJECT = 31,    /* permanent rejection; every qmail knows it */
  ST_SQ_VIRUS = 32,  /* sqmail dialect */
  ST_SQ_SPAM = 33,   /* sqmail dialect */
  ST_SQ_BANNED = 34, /* sqmail dialect */
  ST_MEMORY = 51,    /* out of memory, descriptors or processes */
  ST_TIMEOUT = 52,
  ST_WRITE = 53, /* write error or disk full */
  ST_READ = 54,  /* read error, or incomplete envelope: the caller gave up */
  ST_CONF = 55,  /* cannot read the configuration */
  ST_DEFER = 71, /* temporary rejection; every qmail knows it */
  ST_BUG = 81,
  ST_TEXT = 82,     /* the reply is in the error pipe (notqmail, simscan, sagredo) */
  ST_TEXT_IM = 88,  /* the same, indimail */
  ST_GRAMMAR = 91,  /* not an envelope */
  ST_NO_EXEC = 120, /* the real qmail-queue could not be started */
};

#endif
