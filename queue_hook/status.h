/* Every exit status that this program may leave with. Callers turn 11, 31 to 40 and 115 into a permanent
 * refusal and the rest into "try again" (qmail-queue(8)), so no errno and no accident may choose one. */
#ifndef STATUS_H
#define STATUS_H

enum status {
  ST_OK = 0,
  ST_ADDRESS = 11,   /* an envelope address over 1002 bytes */
  ST_REJECT = 31,    /* refused for good; every qmail knows it */
  ST_SQ_VIRUS = 32,  /* sqmail dialect */
  ST_SQ_SPAM = 33,   /* sqmail dialect */
  ST_SQ_BANNED = 34, /* sqmail dialect */
  ST_MEMORY = 51,    /* out of memory, descriptors or processes */
  ST_TIMEOUT = 52,
  ST_WRITE = 53, /* write error or disk full */
  ST_READ = 54,  /* read error, or the envelope ended early: the caller gave up */
  ST_CONF = 55,  /* unable to read configuration */
  ST_DEFER = 71, /* refused for now; every qmail knows it */
  ST_BUG = 81,
  ST_TEXT = 82,     /* the reply stands in the error pipe (notqmail, simscan, sagredo) */
  ST_TEXT_IM = 88,  /* the same, indimail */
  ST_GRAMMAR = 91,  /* not an envelope */
  ST_NO_EXEC = 120, /* the real qmail-queue could not be started */
};

#endif
