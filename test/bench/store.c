/* What systemd is to the daemons of the benchmark: reads the notify socket, keeps what
 * descriptors come with FDSTORE=1 under their FDNAME= until FDSTOREREMOVE=1 names them,
 * and does nothing else, so that it takes as little as it can of the CPUs.
 *
 * Usage: store NOTIFY-SOCKET
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <signal.h>
#include <unistd.h>

#define BUCKETS 16384
#define MESSAGE_SIZE 4096
/* As many descriptors as Linux sends at once (SCM_MAX_FD of unix(7)). */
#define MAX_DESCRIPTORS 253

struct stored {
    struct stored *next;
    int fd;
    char name[];
};

static struct stored *buckets[BUCKETS];

static struct stored **bucket_of(const char *name)
{
    uint32_t hash = 2166136261u; /* FNV-1a */

    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 16777619u;
    return &buckets[hash % BUCKETS];
}

static void keep(const char *name, int fd)
{
    struct stored **bucket = bucket_of(name), *stored;

    stored = malloc(sizeof *stored + strlen(name) + 1);
    if (stored == NULL)
        err(1, "malloc");
    stored->fd = fd;
    stored->next = *bucket;
    strcpy(stored->name, name);
    *bucket = stored;
}

static void drop(const char *name)
{
    struct stored **place = bucket_of(name), *stored;

    while ((stored = *place) != NULL) {
        if (strcmp(stored->name, name) == 0) {
            *place = stored->next;
            close(stored->fd);
            free(stored);
        } else {
            place = &stored->next;
        }
    }
}

static void obey(char *message, const int *fds, int count)
{
    bool stores = false, removes = false;
    const char *name = "stored";

    for (char *line = strtok(message, "\n"); line; line = strtok(NULL, "\n")) {
        stores |= strcmp(line, "FDSTORE=1") == 0;
        removes |= strcmp(line, "FDSTOREREMOVE=1") == 0;
        if (strncmp(line, "FDNAME=", strlen("FDNAME=")) == 0)
            name = line + strlen("FDNAME=");
    }
    if (removes)
        drop(name);
    for (int i = 0; i < count; i++) {
        if (stores && !removes)
            keep(name, fds[i]);
        else
            close(fds[i]);
    }
}

static void take_message(int fd)
{
    static char data[MESSAGE_SIZE + 1];
    static char control[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))]
        __attribute__((aligned(8)));
    struct iovec vector = {data, MESSAGE_SIZE};
    struct msghdr message = {
        .msg_iov = &vector,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof control,
    };
    ssize_t length = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    int count = 0;

    if (length == -1)
        err(1, "recvmsg");
    data[length] = '\0';
    if (header != NULL && header->cmsg_type == SCM_RIGHTS)
        count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    obey(data, count ? (int *)CMSG_DATA(header) : NULL, count);
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct rlimit files;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (argc != 2)
        errx(2, "usage: store NOTIFY-SOCKET");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", argv[1]);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) == -1)
        err(1, "%s", argv[1]);
    printf("\n"); /* it can be sent to */
    fflush(stdout);
    for (;;)
        take_message(fd);
}
