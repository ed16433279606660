/*
 * qqbench: load driver for programs that speak the qmail-queue protocol.
 *
 * usage: qqbench [options] PROGRAM CORPUS
 *
 *   PROGRAM  the program to run for each message: qmail-queue itself or a replacement.
 *            It gets the message on descriptor 0 and the envelope (F sender \0 T recipient \0 ... \0) on
 *            descriptor 1, both pipes, as from qmail-smtpd; its exit status is the result.
 *   CORPUS   a folder of *.eml files; with a manifest.tsv (file size kind expected) results are counted by kind.
 *
 *   -c N      N concurrent clients (1)
 *   -n N      N messages in all (one pass over the corpus); passes walk the same shuffled order
 *   -w N      N messages first that are not counted (0)
 *   -m N -M N only corpus files of at least / at most N bytes
 *   -k KIND   only corpus files of that kind (second word of the file name: NNNN-KIND.eml)
 *   -b N      bytes per write into the message pipe (1024, what qmail.c does)
 *   -U        do not put a unique Received: line before every message (default: do)
 *   -A ARG    give PROGRAM this argument (may repeat)
 *   -V N=V    set this variable in PROGRAM's environment (may be repeated)
 *   -f ADDR   envelope sender (bench@sender.example)      -r ADDR  recipient (may repeat; user@bench.example)
 *   -t SEC    kill a client after SEC seconds (300); counted as rc -9
 *   -D PIDS   comma list of daemon process ids: their CPU, and that of all their descendants, is added up
 *   -S MS     sample memory every MS milliseconds (costs CPU: never in a timed run)
 *   -E FD     give PROGRAM a third pipe on descriptor FD for a rejection text, read to its end before the wait
 *             (6 is what notqmail does, 4 and 2 are what common patches do); the text shows in -o
 *   -e        let PROGRAM keep our stderr (default: /dev/null)
 *   -o FILE   per message: file, rc, microseconds, cpu microseconds, maxrss kB, text from -E
 *   -j FILE   append one JSON line with the results       -l LABEL  the label in it
 *
 * Build: cc -O2 -o qqbench qqbench.c
 *
 * How it counts.  N forked workers take the next message from a shared counter; a worker makes two pipes, spawns
 * PROGRAM, writes message and envelope, closes, waits.  Latency: from before the spawn to after the wait, which is
 * what an SMTP client waits for after its final dot.  "hook cpu": user+sys of PROGRAM and the descendants it waited
 * for (wait4).  "daemon cpu": difference of /proc/PID/stat over the -D trees.  "system cpu": busy time of all CPUs
 * from /proc/stat (kernel threads, driver and other programs too): an upper bound.  "driver cpu": the workers' own.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct file { char *name, *path; size_t len; char kind[16], want[16]; };
struct result { double us; long cpu_us; long rss_kb; int rc; int file; char text[120]; };
struct shared { atomic_long next; atomic_int stop; double peak_pss_kb, sum_pss_kb; long samples, peak_procs, peak_rss_kb;
                double daemon_peak_kb; struct rusage self[4096]; };

static struct file *files;
static int nfiles, *order;
static long total, warm;
static int conc = 1, uniq = 1, keeperr, timeout_s = 300, sample_ms, errfd = -1;
static size_t chunk = 1024;
static char envelope[65536];
static size_t envlen;
static char *pargv[64];
static int pargc = 1;
static struct shared *sh;
static struct result *res;
static pid_t daemons[64];
static int ndaemons;
static volatile pid_t current;
extern char **environ;

static void die(const char *s) { perror(s); exit(111); }

static double now(void)
{
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static int cmpname(const void *a, const void *b)
{
  return strcmp(((const struct file *)a)->name, ((const struct file *)b)->name);
}

static void load(const char *dir, long min, long max, const char *kind)
{
  char path[4096], line[1024], a[512], k[64], w[64];
  struct dirent *e;
  struct stat st;
  FILE *f;
  int i;
  DIR *d = opendir(dir);
  if (!d) die(dir);
  while ((e = readdir(d))) {
    size_t n = strlen(e->d_name);
    if (n < 5 || strcmp(e->d_name + n - 4, ".eml")) continue;
    snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
    if (stat(path, &st) || st.st_size < min || (max && st.st_size > max)) continue;
    struct file x = {0};
    const char *p = strchr(e->d_name, '-');
    if (p) { strncpy(x.kind, p + 1, 15); *strchrnul(x.kind, '.') = 0; }
    if (kind && strcmp(kind, x.kind)) continue;
    x.len = st.st_size;
    x.path = strdup(path);
    x.name = strdup(e->d_name);
    strcpy(x.want, "?");
    files = realloc(files, (nfiles + 1) * sizeof *files);
    files[nfiles++] = x;
  }
  closedir(d);
  if (!nfiles) { fprintf(stderr, "qqbench: no messages\n"); exit(100); }
  qsort(files, nfiles, sizeof *files, cmpname);
  snprintf(path, sizeof path, "%s/manifest.tsv", dir);
  if ((f = fopen(path, "r"))) {
    while (fgets(line, sizeof line, f))
      if (sscanf(line, "%511s %*s %63s %63s", a, k, w) == 3)
        for (i = 0; i < nfiles; i++)
          if (!strcmp(files[i].name, a)) snprintf(files[i].want, 16, "%.15s", w);
    fclose(f);
  }
  order = malloc(nfiles * sizeof *order);
  for (i = 0; i < nfiles; i++) order[i] = i;
  unsigned long long s = 88172645463325252ULL;
  for (i = nfiles - 1; i > 0; i--) {           /* a fixed shuffle: every run sees the same sequence */
    s ^= s << 13; s ^= s >> 7; s ^= s << 17;
    int j = s % (i + 1), t = order[i];
    order[i] = order[j]; order[j] = t;
  }
}

/* ---- CPU and memory of other processes --------------------------------------------------------------------- */

static int inset(pid_t p, pid_t *set, int n) { while (n--) if (set[n] == p) return 1; return 0; }

/* all processes below the roots (roots included when self=1) */
static int tree(pid_t *roots, int nroots, int self, pid_t *out, int max)
{
  static pid_t pid[65536], ppid[65536];
  int n = 0, i, m = 0, grew;
  struct dirent *e;
  DIR *d = opendir("/proc");
  while ((e = readdir(d))) {
    char path[300], buf[512], *p;
    int fd, r;
    if (e->d_name[0] < '0' || e->d_name[0] > '9' || n >= 65536) continue;
    snprintf(path, sizeof path, "/proc/%s/stat", e->d_name);
    if ((fd = open(path, O_RDONLY)) < 0) continue;
    r = read(fd, buf, sizeof buf - 1);
    close(fd);
    if (r <= 0) continue;
    buf[r] = 0;
    if (!(p = strrchr(buf, ')'))) continue;
    pid[n] = atoi(e->d_name);
    ppid[n++] = atoi(p + 4);
  }
  closedir(d);
  for (i = 0; i < nroots && m < max; i++) out[m++] = roots[i];
  do {
    grew = 0;
    for (i = 0; i < n && m < max; i++)
      if (inset(ppid[i], out, m) && !inset(pid[i], out, m)) { out[m++] = pid[i]; grew = 1; }
  } while (grew);
  if (!self) { memmove(out, out + nroots, (m - nroots) * sizeof *out); m -= nroots; }
  return m;
}

static double tree_cpu(void)                   /* seconds, dead children included */
{
  pid_t p[4096];
  int n = tree(daemons, ndaemons, 1, p, 4096), i;
  double t = 0;
  for (i = 0; i < n; i++) {
    char path[64], buf[1024], *q;
    unsigned long long u = 0, s = 0;
    long long cu = 0, cs = 0;
    FILE *f;
    snprintf(path, sizeof path, "/proc/%d/stat", p[i]);
    if (!(f = fopen(path, "r"))) continue;
    if (fgets(buf, sizeof buf, f) && (q = strrchr(buf, ')')))
      if (sscanf(q + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu %lld %lld", &u, &s, &cu, &cs) == 4)
        t += (double)(u + s + cu + cs) / sysconf(_SC_CLK_TCK);
    fclose(f);
  }
  return t;
}

static double system_cpu(void)
{
  unsigned long long v[8] = {0};
  FILE *f = fopen("/proc/stat", "r");
  if (!f || fscanf(f, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", v, v+1, v+2, v+3, v+4, v+5, v+6, v+7) < 7) return 0;
  fclose(f);
  return (double)(v[0] + v[1] + v[2] + v[5] + v[6]) / sysconf(_SC_CLK_TCK);
}

static double pss_kb(pid_t p, long *rss)
{
  char path[64], line[256];
  double k = 0;
  long r;
  FILE *f;
  snprintf(path, sizeof path, "/proc/%d/smaps_rollup", p);
  if (!(f = fopen(path, "r"))) return 0;
  while (fgets(line, sizeof line, f)) {
    double v;
    if (sscanf(line, "Pss: %lf", &v) == 1) k = v;
    if (sscanf(line, "Rss: %ld", &r) == 1) *rss += r;
  }
  fclose(f);
  return k;
}

static void sampler(pid_t *workers)
{
  pid_t p[4096];
  while (!sh->stop) {
    int n = tree(workers, conc, 0, p, 4096), i, live = 0;
    double k = 0, d = 0;
    long rss = 0, x = 0;
    for (i = 0; i < n; i++) { double one = pss_kb(p[i], &rss); if (one > 0) live++; k += one; }
    if (k > sh->peak_pss_kb) { sh->peak_pss_kb = k; sh->peak_procs = live; sh->peak_rss_kb = rss; }
    sh->sum_pss_kb += k;
    sh->samples++;
    n = ndaemons ? tree(daemons, ndaemons, 1, p, 4096) : 0;
    for (i = 0; i < n; i++) d += pss_kb(p[i], &x);
    if (d > sh->daemon_peak_kb) sh->daemon_peak_kb = d;
    usleep(sample_ms * 1000);
  }
  _exit(0);
}

/* ---- one client --------------------------------------------------------------------------------------------- */

static void onalarm(int s) { (void)s; if (current > 0) kill(current, SIGKILL); }

static int put(int fd, const char *p, size_t n)
{
  while (n) {
    ssize_t w = write(fd, p, n < chunk ? n : chunk);
    if (w < 0) { if (errno == EINTR) continue; return -1; }
    p += w; n -= w;
  }
  return 0;
}

/* the message goes through a small buffer, so that a worker stays small: a spawned program's maxrss starts at ours */
static int putfile(int to, const char *path)
{
  char buf[65536];
  ssize_t n;
  int r = 0, fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) die(path);
  while (!r && (n = read(fd, buf, sizeof buf)) > 0) r = put(to, buf, n);
  close(fd);
  return r;
}

static void one(const char *prog, long idx, struct result *r)
{
  int m[2], e[2], x[2] = { -1, -1 }, st, err;
  char head[256];
  pid_t pid;
  struct rusage ru;
  posix_spawn_file_actions_t fa;
  posix_spawnattr_t at;
  sigset_t none, dfl;
  struct file *f = &files[order[idx % nfiles]];
  double t0 = now();

  if (pipe2(m, O_CLOEXEC) || pipe2(e, O_CLOEXEC)) die("pipe");
  if (errfd > 1 && pipe2(x, O_CLOEXEC)) die("pipe");
  for (int *p = x; errfd > 1 && p < x + 2; p++)       /* out of the way of the dup2 below */
    if (*p == errfd) { int d = fcntl(*p, F_DUPFD_CLOEXEC, 20); close(*p); *p = d; }
  posix_spawn_file_actions_init(&fa);
  posix_spawn_file_actions_adddup2(&fa, m[0], 0);
  posix_spawn_file_actions_adddup2(&fa, e[0], 1);
  if (!keeperr && errfd != 2) posix_spawn_file_actions_addopen(&fa, 2, "/dev/null", O_WRONLY, 0);
  if (errfd > 1) posix_spawn_file_actions_adddup2(&fa, x[1], errfd);
  posix_spawnattr_init(&at);
  sigemptyset(&none); sigemptyset(&dfl); sigaddset(&dfl, SIGPIPE);
  posix_spawnattr_setsigmask(&at, &none);
  posix_spawnattr_setsigdefault(&at, &dfl);
  posix_spawnattr_setflags(&at, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  err = posix_spawn(&pid, prog, &fa, &at, pargv, environ);
  posix_spawn_file_actions_destroy(&fa);
  posix_spawnattr_destroy(&at);
  close(m[0]); close(e[0]);
  if (errfd > 1) close(x[1]);
  if (err) { errno = err; die(prog); }
  current = pid;
  alarm(timeout_s);
  if (uniq) {
    int n = snprintf(head, sizeof head, "Received: from bench (HELO bench) (127.0.0.1)\n  by 0 with SMTP; %ld.%ld.%d\n",
                     (long)(t0 * 1e6), idx, getpid());
    put(m[1], head, n);
  }
  putfile(m[1], f->path);
  close(m[1]);
  put(e[1], envelope, envlen);
  close(e[1]);
  if (errfd > 1) {
    size_t n = 0;
    ssize_t k;
    char junk[256];
    while ((k = n < sizeof r->text - 1 ? read(x[0], r->text + n, sizeof r->text - 1 - n) : read(x[0], junk, sizeof junk)) > 0)
      if (n < sizeof r->text - 1) n += k;
    r->text[n] = 0;
    close(x[0]);
  }
  while (wait4(pid, &st, 0, &ru) < 0 && errno == EINTR) ;
  alarm(0);
  current = 0;
  r->us = (now() - t0) * 1e6;
  r->rc = WIFEXITED(st) ? WEXITSTATUS(st) : -WTERMSIG(st);
  r->cpu_us = (ru.ru_utime.tv_sec + ru.ru_stime.tv_sec) * 1000000L + ru.ru_utime.tv_usec + ru.ru_stime.tv_usec;
  r->rss_kb = ru.ru_maxrss;
  r->file = order[idx % nfiles];
}

static void worker(const char *prog, long from, long to, int w)
{
  struct sigaction sa = { .sa_handler = onalarm };
  sigaction(SIGALRM, &sa, 0);
  signal(SIGPIPE, SIG_IGN);
  for (;;) {
    long i = atomic_fetch_add(&sh->next, 1);
    if (i >= to) break;
    one(prog, i, &res[i]);
  }
  (void)from;
  getrusage(RUSAGE_SELF, &sh->self[w]);
  _exit(0);
}

static double run(const char *prog, long from, long to, int sampling)
{
  pid_t *p = calloc(conc + 1, sizeof *p), s = 0;
  int i;
  double t0;
  sh->next = from;
  sh->stop = 0;
  t0 = now();
  for (i = 0; i < conc; i++) {
    p[i] = fork();
    if (p[i] < 0) die("fork");
    if (!p[i]) worker(prog, from, to, i);
  }
  if (sampling && !(s = fork())) sampler(p);
  for (i = 0; i < conc; i++) waitpid(p[i], 0, 0);
  t0 = now() - t0;
  sh->stop = 1;
  if (s) waitpid(s, 0, 0);
  free(p);
  return t0;
}

static int cmpd(const void *a, const void *b)
{
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
  int o, i, j;
  long min = 0, max = 0, want = 0;
  char *kind = 0, *jfile = 0, *ofile = 0, *label = 0, *q;
  const char *from = "bench@sender.example", *rcpt[100];
  int nr = 0;
  while ((o = getopt(argc, argv, "c:n:w:m:M:k:b:UA:V:f:r:t:D:S:eE:o:j:l:h")) != -1)
    switch (o) {
      case 'c': conc = atoi(optarg); break;
      case 'n': want = atol(optarg); break;
      case 'w': warm = atol(optarg); break;
      case 'm': min = atol(optarg); break;
      case 'M': max = atol(optarg); break;
      case 'k': kind = optarg; break;
      case 'b': chunk = atol(optarg); break;
      case 'U': uniq = 0; break;
      case 'A': if (pargc < 60) pargv[pargc++] = optarg; break;
      case 'V': if (putenv(optarg)) die("putenv"); break;
      case 'f': from = optarg; break;
      case 'r': if (nr < 100) rcpt[nr++] = optarg; break;
      case 't': timeout_s = atoi(optarg); break;
      case 'D': for (q = strtok(optarg, ", "); q; q = strtok(0, ", ")) if (ndaemons < 64) daemons[ndaemons++] = atoi(q); break;
      case 'S': sample_ms = atoi(optarg); break;
      case 'e': keeperr = 1; break;
      case 'E': errfd = atoi(optarg); break;
      case 'o': ofile = optarg; break;
      case 'j': jfile = optarg; break;
      case 'l': label = optarg; break;
      default: fprintf(stderr, "usage: qqbench [-c N] [-n N] [-w N] [-m MIN] [-M MAX] [-k KIND] [-b BYTES] [-U] [-A ARG]... [-V NAME=VALUE]...\n"
                       "  [-f SENDER] [-r RCPT]... [-t SEC] [-D PID,...] [-S MS] [-e] [-E FD] [-o FILE] [-j FILE] [-l LABEL] PROGRAM CORPUS\n");
               return 100;
    }
  if (argc - optind != 2 || conc < 1 || conc > 4096) { fprintf(stderr, "qqbench: need PROGRAM and CORPUS (-h)\n"); return 100; }
  const char *prog = argv[optind];
  pargv[0] = (char *)prog;
  if (!label) label = (char *)prog;
  load(argv[optind + 1], min, max, kind);
  total = want ? want : nfiles;
  if (!nr) rcpt[nr++] = "user@bench.example";
  envlen = sprintf(envelope, "F%.900s", from) + 1;
  for (i = 0; i < nr; i++) envlen += sprintf(envelope + envlen, "T%.400s", rcpt[i]) + 1;
  envelope[envlen++] = 0;

  sh = mmap(0, sizeof *sh, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  res = mmap(0, (warm + total + 1) * sizeof *res, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (sh == MAP_FAILED || res == MAP_FAILED) die("mmap");
  if (warm) run(prog, 0, warm, 0);

  double d0 = tree_cpu(), s0 = system_cpu();
  double wall = run(prog, warm, warm + total, sample_ms > 0);
  double dcpu = tree_cpu() - d0, scpu = system_cpu() - s0, hcpu = 0, drv = 0, mean = 0;
  double *us = malloc(total * sizeof *us);
  long rss = 0;
  size_t bytes = 0;
  int codes[512] = {0};
  for (i = 0; i < total; i++) {
    struct result *r = &res[warm + i];
    us[i] = r->us; mean += r->us / total; hcpu += r->cpu_us / 1e6;
    if (r->rss_kb > rss) rss = r->rss_kb;
    bytes += files[r->file].len;
    codes[r->rc + 256 > 511 ? 511 : r->rc + 256]++;
  }
  for (i = 0; i < conc; i++)
    drv += sh->self[i].ru_utime.tv_sec + sh->self[i].ru_stime.tv_sec + (sh->self[i].ru_utime.tv_usec + sh->self[i].ru_stime.tv_usec) / 1e6;
  qsort(us, total, sizeof *us, cmpd);
#define Q(p) (us[(long)((total - 1) * (p))] / 1000)
  printf("%-28s c=%-3d n=%-6ld %8.1f msg/s  p50 %8.2f  p90 %8.2f  p99 %9.2f  max %9.2f ms | cpu ms/msg hook %6.2f daemon %6.2f "
         "system %6.2f driver %5.2f | rss %ld kB | rc", label, conc, total, total / wall, Q(.5), Q(.9), Q(.99), us[total - 1] / 1000,
         hcpu * 1000 / total, dcpu * 1000 / total, scpu * 1000 / total, drv * 1000 / total, rss);
  for (i = 0; i < 512; i++) if (codes[i]) printf(" %d:%d", i - 256, codes[i]);
  if (sample_ms)
    printf(" | memory: peak PSS of all hooks %.0f kB (%ld processes, %.0f kB per client; RSS %ld kB), mean %.0f kB, daemons peak PSS %.0f kB",
           sh->peak_pss_kb, sh->peak_procs, sh->peak_pss_kb / conc, sh->peak_rss_kb,
           sh->samples ? sh->sum_pss_kb / sh->samples : 0, sh->daemon_peak_kb);
  printf("\n");
  /* verdicts by expectation */
  char seen[32][16];
  int ns = 0;
  for (i = 0; i < nfiles; i++) {
    for (j = 0; j < ns && strcmp(seen[j], files[i].want); j++) ;
    if (j == ns && ns < 32) strcpy(seen[ns++], files[i].want);
  }
  FILE *jf = jfile ? fopen(jfile, "a") : 0;
  if (jf) fprintf(jf, "{\"label\":\"%s\",\"c\":%d,\"n\":%ld,\"wall\":%.4f,\"rate\":%.2f,\"mean\":%.3f,\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f,"
                  "\"max\":%.3f,\"hook\":%.4f,\"daemon\":%.4f,\"system\":%.4f,\"driver\":%.4f,\"bytes\":%zu,\"rss\":%ld,\"pss_peak\":%.0f,"
                  "\"procs\":%ld,\"daemon_pss\":%.0f,\"rc\":{", label, conc, total, wall, total / wall, mean / 1000, Q(.5), Q(.9), Q(.99),
                  us[total - 1] / 1000, hcpu * 1000 / total, dcpu * 1000 / total, scpu * 1000 / total, drv * 1000 / total, bytes, rss,
                  sh->peak_pss_kb, sh->peak_procs, sh->daemon_peak_kb);
  int first = 1;
  for (j = 0; j < ns; j++) {
    int c[512] = {0};
    for (i = 0; i < total; i++)
      if (!strcmp(files[res[warm + i].file].want, seen[j])) c[res[warm + i].rc + 256 > 511 ? 511 : res[warm + i].rc + 256]++;
    for (i = 0; i < 512; i++)
      if (c[i] && jf) { fprintf(jf, "%s\"%s:%d\":%d", first ? "" : ",", seen[j], i - 256, c[i]); first = 0; }
  }
  if (jf) { fprintf(jf, "}}\n"); fclose(jf); }
  if (ofile) {
    FILE *f = fopen(ofile, "w");
    if (!f) die(ofile);
    for (i = 0; i < total; i++) {
      struct result *r = &res[warm + i];
      r->text[strcspn(r->text, "\r\n\t")] = 0;
      fprintf(f, "%s\t%d\t%.0f\t%ld\t%ld\t%s\n", files[r->file].name, r->rc, r->us, r->cpu_us, r->rss_kb, r->text);
    }
    fclose(f);
  }
  return 0;
}
