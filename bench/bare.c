/* Baseline for the hook: a program that reads message and envelope, and nothing more.
 *
 *   cc -O2 -static bare.c              reads both descriptors to their ends
 *   cc -O2 -static -DSTORE bare.c      also stores the message in a memfd, as any program that passes it on must
 *   cc -O2 -static -DNOTHING bare.c    only starts and exits
 *   cc -O2 -static -DWAIT bare.c       reads, sleeps for 0.3 ms, and execs the program in $NEXT
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef NOTHING
static char bytes[65536];
#endif

int main(void)
{
#ifndef NOTHING
  ssize_t got;
#ifdef STORE
  int to = memfd_create("bare", MFD_CLOEXEC);
#endif
  while ((got = read(0, bytes, sizeof bytes)) > 0) {
#ifdef STORE
    if (write(to, bytes, (size_t)got) != got) return 53;
#endif
  }
  while (got >= 0 && (got = read(1, bytes, sizeof bytes)) > 0) {
  }
  if (got) return 54;
#ifdef WAIT
  char *next = getenv("NEXT"), *none[] = {next, NULL};
  nanosleep(&(struct timespec){0, 300000}, NULL);
  execve(next, none, none + 1);
  return 120;
#endif
#endif
  return 0;
}
