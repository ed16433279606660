/* What the hook is measured against: a program that reads message and envelope, and nothing more.
 *
 *   cc -O2 -static bare.c              reads both descriptors to their ends
 *   cc -O2 -static -DSTORE bare.c      also keeps the message in a memfd, as whoever passes it on must
 *   cc -O2 -static -DNOTHING bare.c    only starts and ends
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

static char bytes[65536];

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
  return got ? 54 : 0;
#endif
}
