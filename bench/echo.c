/* Answers every hook immediately: queue the message with one header line added. Shows the cost of the hook itself.
 *
 *   cc -O2 echo.c; ./a.out SOCKET       prints one line when it is listening; protocol: docs/hook-protocol.md
 */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char line[] = "X-ContentFilter: 0123456789abcdef; virus=skipped; spam=skipped\n";

int main(int count, char **arguments)
{
  static char request[65536], answer[24 + 28 + sizeof line - 1];
  struct sockaddr_un at = {.sun_family = AF_UNIX};
  int listener = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  if (count != 2 || strlen(arguments[1]) >= sizeof at.sun_path) return 100;
  strcpy(at.sun_path, arguments[1]);
  if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) return 111;
  memcpy(answer, "CFA1\1\0\1\0\0\0\1", 11); /* version 1, queue, no reason, no text, one submission */
  answer[16] = 28 + sizeof line - 1;          /* the body's size */
  answer[24] = 1;                             /* the envelope as received */
  answer[24 + 12] = sizeof line - 1;
  memcpy(answer + 24 + 28, line, sizeof line - 1);
  puts("listening");
  fflush(stdout);
  for (;;) {
    union {
      struct cmsghdr head;
      char room[64];
    } control;
    struct iovec bytes = {request, sizeof request};
    struct msghdr in = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int hook = accept(listener, NULL, NULL);
    if (hook < 0) return 111;
    if (recvmsg(hook, &in, 0) > 0) {
      struct cmsghdr *head = CMSG_FIRSTHDR(&in);
      int fds[2] = {-1, -1};
      if (head && head->cmsg_len == CMSG_LEN(sizeof fds)) memcpy(fds, CMSG_DATA(head), sizeof fds);
      close(fds[0]);
      close(fds[1]);
      send(hook, answer, sizeof answer, MSG_NOSIGNAL);
    }
    close(hook);
  }
}
