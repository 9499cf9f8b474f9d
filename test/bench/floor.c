/* The floor of the benchmark: the least that any program has to do for a user's
 * shutdown to become a file. It watches one directory that is there already, connects
 * to each monitor socket, again and again until somebody listens, negotiates, reads,
 * searches what it read for SHUTDOWN and creates the file. It knows no reasons, no
 * powerdown, no cluster, no log, and forgives nothing: no daemon, only a yardstick.
 *
 * Usage: floor CONTROL-DIR
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SUFFIX ".kvmd"
#define NEGOTIATION "{\"execute\": \"qmp_capabilities\"}\r\n"
#define SHUTDOWN "\"SHUTDOWN\""
#define FIRST_DELAY_NS 1000000L
#define LONGEST_DELAY_NS 1000000000L

struct instance {
    struct instance *next_waiting;
    int64_t due;
    int delay_ns;
    int fd;
    char name[];
};

static int epoll;
/* Those on whose socket nobody listens yet. */
static struct instance *waiting;

static int64_t monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void watch(int fd, void *data)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = data};

    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == -1)
        err(1, "epoll_ctl");
}

static void retry_later(struct instance *instance)
{
    instance->due = monotonic_ns() + instance->delay_ns;
    if (instance->delay_ns < LONGEST_DELAY_NS / 2)
        instance->delay_ns *= 2;
    instance->next_waiting = waiting;
    waiting = instance;
}

static void connect_to(struct instance *instance)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd == -1)
        err(1, "socket");
    snprintf(address.sun_path, sizeof address.sun_path, "%s" SUFFIX, instance->name);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0) {
        send(fd, NEGOTIATION, strlen(NEGOTIATION), MSG_NOSIGNAL);
        instance->fd = fd;
        watch(fd, instance);
        return;
    }
    close(fd);
    if (errno == ECONNREFUSED || errno == EAGAIN)
        retry_later(instance);
    else
        free(instance);
}

static void retry_due(void)
{
    int64_t now = monotonic_ns();
    struct instance *instance, *next = waiting;

    waiting = NULL;
    while ((instance = next) != NULL) {
        next = instance->next_waiting;
        if (instance->due <= now) {
            connect_to(instance);
        } else {
            instance->next_waiting = waiting;
            waiting = instance;
        }
    }
}

static const struct timespec *until_next_retry(struct timespec *timeout)
{
    int64_t earliest = INT64_MAX, left;

    for (struct instance *instance = waiting; instance; instance = instance->next_waiting)
        if (instance->due < earliest)
            earliest = instance->due;
    if (earliest == INT64_MAX)
        return NULL;
    left = earliest - monotonic_ns();
    if (left < 0)
        left = 0;
    timeout->tv_sec = left / 1000000000L;
    timeout->tv_nsec = left % 1000000000L;
    return timeout;
}

static void discover(const char *file)
{
    size_t length = strlen(file), suffix = strlen(SUFFIX);
    struct instance *instance;

    if (length <= suffix || strcmp(file + length - suffix, SUFFIX) != 0)
        return;
    instance = malloc(sizeof *instance + length - suffix + 1);
    if (instance == NULL)
        err(1, "malloc");
    memcpy(instance->name, file, length - suffix);
    instance->name[length - suffix] = '\0';
    instance->delay_ns = FIRST_DELAY_NS;
    connect_to(instance);
}

static void read_directory(void)
{
    DIR *directory = opendir(".");
    struct dirent *entry;

    if (directory == NULL)
        err(1, "opendir");
    while ((entry = readdir(directory)) != NULL)
        discover(entry->d_name);
    closedir(directory);
}

static void read_watch(int inotify)
{
    static char buffer[65536] __attribute__((aligned(8)));
    ssize_t length = read(inotify, buffer, sizeof buffer);
    struct inotify_event *event;

    for (char *next = buffer; next < buffer + length;
         next += sizeof *event + event->len) {
        event = (struct inotify_event *)next;
        if (event->len)
            discover(event->name);
    }
}

static void create_shutdown_file(const struct instance *instance)
{
    char path[NAME_MAX + 1];
    int fd;

    snprintf(path, sizeof path, "%s.shutdown", instance->name);
    fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    if (fd != -1)
        close(fd);
}

static void read_monitor(struct instance *instance)
{
    static char buffer[65536];
    ssize_t length = recv(instance->fd, buffer, sizeof buffer, 0);

    if (length > 0) {
        if (memmem(buffer, length, SHUTDOWN, strlen(SHUTDOWN)) != NULL)
            create_shutdown_file(instance);
    } else if (length == 0 || errno != EAGAIN) {
        close(instance->fd);
        free(instance);
    }
}

int main(int argc, char **argv)
{
    struct rlimit files;
    struct epoll_event events[256];
    int inotify;

    if (argc != 2)
        errx(2, "usage: floor CONTROL-DIR");
    if (chdir(argv[1]) == -1)
        err(1, "%s", argv[1]);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    inotify = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (epoll == -1 || inotify_add_watch(inotify, ".", IN_CREATE) == -1)
        err(1, "inotify");
    watch(inotify, NULL);
    read_directory();
    for (;;) {
        struct timespec timeout;
        int count = epoll_pwait2(epoll, events, 256, until_next_retry(&timeout), NULL);

        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == NULL)
                read_watch(inotify);
            else
                read_monitor(events[i].data.ptr);
        }
        retry_due();
    }
}
