/* Runs a program and lets something go wrong at its n-th system call (ptrace; the real, static binary).
 *
 *   inject N HOW WHO LOG PROGRAM ARGUMENTS...
 *
 * N    from 1, counted after the program has been started; 0: never, and LOG gets the name of every call
 * HOW  a number: the call is not made and fails with this errno; kill: SIGKILL right before it;
 *      short: a call that moves bytes moves seven at most
 * WHO  hook: the calls of the program itself; part: those of the processes that it forks, all counted together;
 *      commit: only the hook's writes of one byte, which are the last NULs of the envelopes
 * LOG  gets the name of the call that was hit; stays empty where there were fewer than N
 *
 * The calls of whatever the program or its parts become by execve do not count. Leaves as the program left. */
#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <linux/ptrace.h>
#include <unistd.h>

#define CALL(name) {SYS_##name, #name}
static const struct { long number; const char *name; } names[] = {
  CALL(read), CALL(write), CALL(open), CALL(openat), CALL(close), CALL(stat), CALL(fstat), CALL(newfstatat), CALL(poll),
  CALL(lseek), CALL(mmap), CALL(munmap), CALL(mprotect), CALL(brk), CALL(rt_sigaction), CALL(rt_sigprocmask), CALL(ioctl),
  CALL(pread64), CALL(writev), CALL(pipe2), CALL(dup2), CALL(dup3), CALL(getpid), CALL(getppid), CALL(gettid), CALL(sendfile),
  CALL(socket), CALL(connect), CALL(sendto), CALL(sendmsg), CALL(recvmsg), CALL(clone), CALL(fork), CALL(vfork),
  CALL(execve), CALL(wait4), CALL(kill), CALL(fcntl), CALL(alarm), CALL(setitimer), CALL(splice), CALL(memfd_create),
  CALL(rt_sigtimedwait), CALL(clock_gettime), CALL(close_range), CALL(arch_prctl), CALL(set_tid_address), CALL(exit_group),
  CALL(uname), CALL(readlink), CALL(prlimit64), CALL(getrandom), CALL(set_robust_list), CALL(rseq), CALL(exit),
};

static FILE *file;
static pid_t hook, hit; /* hit: whose call is being failed */
static long at, calls;
static int error, parts, commit, done, started;
static enum { FAIL, KILL, SHORT } how;

static void die(const char *what)
{
  perror(what);
  exit(125);
}

static void note(long number)
{
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].number == number) {
      fprintf(file, "%s\n", names[i].name);
      return;
    }
  fprintf(file, "%ld\n", number);
}

/* Where a call keeps how many bytes it may move. */
static unsigned long long *room(struct user_regs_struct *regs)
{
  switch (regs->orig_rax) {
    case SYS_read: case SYS_write: case SYS_pread64: case SYS_sendto: return &regs->rdx;
    case SYS_sendfile: return &regs->r10;
    case SYS_splice: return &regs->r8;
  }
  return NULL;
}

static void enter(pid_t pid)
{
  struct user_regs_struct regs;
  if (ptrace(PTRACE_GETREGS, pid, 0, &regs)) return; /* killed meanwhile */
  if (commit && (regs.orig_rax != SYS_write || regs.rdx != 1)) return;
  calls++;
  if (!at) note((long)regs.orig_rax);
  if (!at || calls != at) return;
  note((long)regs.orig_rax);
  if (how == KILL) {
    kill(pid, SIGKILL);
    done = 1;
  } else if (how == SHORT) {
    unsigned long long *bytes = room(&regs);
    if (bytes && *bytes > 7) *bytes = 7;
    if (ptrace(PTRACE_SETREGS, pid, 0, &regs)) die("setregs");
    done = 1;
  } else {
    if (regs.orig_rax != SYS_close) regs.orig_rax = (unsigned long long)-1; /* close(2): it is closed even so */
    if (ptrace(PTRACE_SETREGS, pid, 0, &regs)) die("setregs");
    hit = pid;
  }
}

static void leave_call(pid_t pid)
{
  struct user_regs_struct regs;
  if (pid != hit || ptrace(PTRACE_GETREGS, pid, 0, &regs)) return;
  regs.rax = (unsigned long long)-error;
  if (ptrace(PTRACE_SETREGS, pid, 0, &regs)) die("setregs");
  hit = 0;
  done = 1;
}

/* Returns the signal to go on with, or -1 to let it run free from here. */
static int stopped(pid_t pid, int status)
{
  int sig = WSTOPSIG(status), event = status >> 16;
  struct ptrace_syscall_info info;
  if (event == PTRACE_EVENT_EXEC) {
    if (pid != hook || started) return -1;
    started = 1;
    return 0;
  }
  if (sig == (SIGTRAP | 0x80)) {
    if (started && (pid != hook) == parts && ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof info, &info) > 0) {
      if (info.op == PTRACE_SYSCALL_INFO_ENTRY) enter(pid);
      if (info.op == PTRACE_SYSCALL_INFO_EXIT) leave_call(pid);
    }
    return done ? -1 : 0;
  }
  if (event) return 0;
  return sig == SIGSTOP ? 0 : sig; /* a new part starts with one; the hook gets none in these tests */
}

int main(int count, char **arguments)
{
  int status, result = 125 << 8;
  if (count < 6) return 125;
  at = atol(arguments[1]);
  how = !strcmp(arguments[2], "kill") ? KILL : !strcmp(arguments[2], "short") ? SHORT : FAIL;
  error = atoi(arguments[2]);
  parts = !strcmp(arguments[3], "part");
  commit = !strcmp(arguments[3], "commit");
  if (!(file = fopen(arguments[4], "we"))) die(arguments[4]);
  hook = fork();
  if (!hook) {
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    execv(arguments[5], arguments + 5);
    _exit(125);
  }
  for (int fd = 0; fd < 8; fd++) /* what the hook closes must be closed */
    if (fd != 2 && fd != fileno(file)) close(fd);
  if (waitpid(hook, &status, 0) != hook || !WIFSTOPPED(status)) die("waitpid");
  long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL;
  if (parts) options |= PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE;
  if (ptrace(PTRACE_SETOPTIONS, hook, 0, options)) die("setoptions");
  ptrace(PTRACE_SYSCALL, hook, 0, 0);
  for (pid_t pid; (pid = waitpid(-1, &status, __WALL)) > 0;) {
    if (WIFSTOPPED(status)) {
      int sig = stopped(pid, status);
      ptrace(sig < 0 ? PTRACE_DETACH : PTRACE_SYSCALL, pid, 0, sig < 0 ? 0 : sig);
    } else if (pid == hook) {
      result = status;
    }
  }
  if (fclose(file)) return 125;
  if (!WIFSIGNALED(result)) return WEXITSTATUS(result);
  setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
  signal(WTERMSIG(result), SIG_DFL);
  kill(getpid(), WTERMSIG(result));
  pause();
}
