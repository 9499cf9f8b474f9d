/* The load side of the benchmark: up to some thousand fake QEMUs in one process, made
 * to wait less for itself than for the daemon that is measured.
 *
 * Usage: load CONTROL-DIR
 *
 * Reads a command per line and answers each with one line of integers. Times are in
 * nanoseconds, those of events by CLOCK_MONOTONIC. A negative one: it did not happen.
 * An instance is a number; FIRST COUNT names a range of them.
 *
 *   listen FIRST COUNT               bind and listen               -> 0
 *   wait FIRST COUNT TIMEOUT_MS      for all to be negotiated with -> how many, when
 *                                    the first, when the last
 *   create FIRST COUNT TIMEOUT_MS    listen and wait               -> how many, time
 *   discover FIRST COUNT PATIENCE_MS create one at a time; bind, then listen a moment
 *                                    later                         -> time for each
 *   verdict FIRST COUNT LIMIT_MS     SHUTDOWN, one instance at a time, until the time
 *                                    is up      -> how many files came after the end
 *                                    of the connection, time for each file
 *   shutdown FIRST COUNT TIMEOUT_MS  SHUTDOWN, all at once         -> files, time
 *   events FIRST COUNT EACH          send so many events of no interest on each, wait
 *                                    until they are taken          -> time
 *   flood NUMBER                     send such events on one, without end -> 0
 *   flooded                          -> bytes taken by the kernel so far, time
 *   calm                             end the flood, or the trickle -> 0
 *   trickle FIRST COUNT INTERVAL_MS  send a space on each, again and again -> 0
 *   lives FIRST COUNT PARALLEL       from listen to end, some in parallel -> lives,
 *                                    those never discovered
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_INSTANCES 10000
/* Room for a file's name, with the NUL at its end. */
#define NAME_SIZE 64
#define US 1000L
#define MS 1000000L

/* QEMU's listen() follows its bind() after so long (seen), and its connections end so
 * long after SHUTDOWN. */
#define SHORTEST_GAP (5 * US)
#define LONGEST_GAP (70 * US)
#define END_OF_CONNECTION (1 * MS)
/* How long the daemon is left alone between two measurements, at least. */
#define PAUSE (2 * MS)
/* What has not happened after so long does not happen any more. */
#define LONG_ENOUGH (2000 * MS)
#define WAVE_PATIENCE (100 * MS)

#define GREETING                                                                     \
    "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, " \
    "\"package\": \"Debian 1:7.2+dfsg-7+deb12u18+b3\"}, "                            \
    "\"capabilities\": [\"oob\"]}}\r\n"
#define DONE "{\"return\": {}}\r\n"
#define STATUS                                                                      \
    "{\"return\": {\"status\": \"running\", \"singlestep\": false, "                \
    "\"running\": true}, \"id\": %.*s}\r\n"
#define SHUTDOWN                                                                    \
    "{\"timestamp\": {\"seconds\": %ld, \"microseconds\": %ld}, "                   \
    "\"event\": \"SHUTDOWN\", "                                                     \
    "\"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\r\n"
#define EVENT                                                                       \
    "{\"timestamp\": {\"seconds\": 1700000000, \"microseconds\": 123456}, "         \
    "\"event\": \"BLOCK_IO_ERROR\", \"data\": {\"device\": \"disk0\", "             \
    "\"nospace\": false, \"operation\": \"write\", \"action\": \"report\", "        \
    "\"reason\": \"Input/output error\"}}\r\n"
#define EVENT_SIZE (sizeof EVENT - 1)
#define BLOCK_SIZE (65536 / EVENT_SIZE * EVENT_SIZE)

struct instance {
    int listener;
    int connection;
    int64_t listened;
    int64_t negotiated;
    int64_t filed;
    /* What was received of a line of commands; Ganeti's own daemon may write them
     * byte by byte. */
    size_t length;
    char commands[256];
};

struct flood {
    int64_t bytes;
};

static struct instance instances[MAX_INSTANCES];
static char block[BLOCK_SIZE];
static int epoll, inotify;
static pid_t flooder;
static volatile struct flood *flood;

static int64_t monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void path_of(int number, const char *suffix, char path[NAME_SIZE])
{
    snprintf(path, NAME_SIZE, "vm%05d.example.org%s", number, suffix);
}

/* The number of the instance that a shutdown file is about, -1 for any other file. */
static int number_of_shutdown_file(const char *file)
{
    char path[NAME_SIZE];
    int number;

    if (sscanf(file, "vm%d.", &number) != 1)
        return -1;
    path_of(number, ".shutdown", path);
    return strcmp(path, file) == 0 ? number : -1;
}

enum source { LISTENER, CONNECTION, DIRECTORY };

static void watch(int fd, enum source source, int number)
{
    struct epoll_event event = {
        .events = EPOLLIN,
        .data.u64 = (uint64_t)number << 2 | source,
    };

    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == -1)
        err(1, "epoll_ctl");
}

static void drop(int *fd)
{
    if (*fd != -1)
        close(*fd);
    *fd = -1;
}

static void say(int fd, const char *text)
{
    if (send(fd, text, strlen(text), MSG_NOSIGNAL) == -1 && errno != EPIPE)
        warn("send");
}

static void accept_client(int number)
{
    struct instance *instance = &instances[number];
    int fd = accept4(instance->listener, NULL, NULL, SOCK_CLOEXEC);

    if (fd == -1)
        return;
    if (instance->connection != -1) { /* QEMU would leave it waiting */
        close(fd);
        return;
    }
    instance->connection = fd;
    instance->length = 0;
    watch(fd, CONNECTION, number);
    say(fd, GREETING);
}

static void answer_status(int fd, const char *command)
{
    const char *id = strstr(command, "\"id\": \"");
    char answer[256];
    int length;

    if (id == NULL)
        return;
    id += strlen("\"id\": ");
    length = strcspn(id + 1, "\"") + 2;
    snprintf(answer, sizeof answer, STATUS, length, id);
    say(fd, answer);
}

static void obey_client(int number, const char *commands)
{
    struct instance *instance = &instances[number];
    const char *status = strstr(commands, "query-status");

    if (strstr(commands, "qmp_capabilities")) {
        if (instance->negotiated == -1)
            instance->negotiated = monotonic_ns();
        say(instance->connection, DONE);
    }
    if (status != NULL)
        answer_status(instance->connection, status);
}

static void read_commands(int number)
{
    struct instance *instance = &instances[number];
    char *end = instance->commands + instance->length;
    ssize_t length = recv(instance->connection, end,
                          sizeof instance->commands - instance->length - 1,
                          MSG_DONTWAIT);

    if (length <= 0) {
        drop(&instance->connection);
        return;
    }
    instance->length += length;
    end[length] = '\0';
    if (end[length - 1] == '\n') {
        obey_client(number, instance->commands);
        instance->length = 0;
    }
}

static void read_directory_events(void)
{
    static char buffer[65536] __attribute__((aligned(8)));
    ssize_t length = read(inotify, buffer, sizeof buffer);
    int64_t now = monotonic_ns();
    struct inotify_event *event;

    for (char *next = buffer; next < buffer + length;
         next += sizeof *event + event->len) {
        int number;

        event = (struct inotify_event *)next;
        number = event->len ? number_of_shutdown_file(event->name) : -1;
        if (number != -1 && instances[number].filed == -1)
            instances[number].filed = now;
    }
}

/* Do what there is to do, once; wait for it until a time, if need be. */
static void serve(int64_t deadline)
{
    struct epoll_event events[256];
    int64_t left = deadline - monotonic_ns();
    struct timespec timeout = {0, 0};
    int count;

    if (left > 0) {
        timeout.tv_sec = left / 1000000000L;
        timeout.tv_nsec = left % 1000000000L;
    }
    count = epoll_pwait2(epoll, events, 256, &timeout, NULL);
    for (int i = 0; i < count; i++) {
        int number = events[i].data.u64 >> 2;

        switch ((enum source)(events[i].data.u64 & 3)) {
        case LISTENER:
            accept_client(number);
            break;
        case CONNECTION:
            read_commands(number);
            break;
        case DIRECTORY:
            read_directory_events();
            break;
        }
    }
}

static bool serve_until(const int64_t *done, int64_t deadline)
{
    while (*done == -1 && monotonic_ns() < deadline)
        serve(deadline);
    return *done != -1;
}

static void serve_for(int64_t duration)
{
    int64_t deadline = monotonic_ns() + duration;

    while (monotonic_ns() < deadline)
        serve(deadline);
}

static void spin_for(int64_t duration)
{
    int64_t deadline = monotonic_ns() + duration;

    while (monotonic_ns() < deadline)
        ;
}

/* One fake QEMU's life. */

static void start(int number, int64_t gap)
{
    struct instance *instance = &instances[number];
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    path_of(number, ".kvmd", address.sun_path);
    instance->connection = -1;
    instance->negotiated = instance->filed = -1;
    instance->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(instance->listener, (struct sockaddr *)&address, sizeof address) == -1)
        err(1, "%s", address.sun_path);
    if (gap > 0)
        spin_for(gap);
    instance->listened = monotonic_ns();
    if (listen(instance->listener, 1) == -1)
        err(1, "listen");
    watch(instance->listener, LISTENER, number);
}

static void send_shutdown(int number)
{
    struct timespec now;
    char event[256];

    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(event, sizeof event, SHUTDOWN, now.tv_sec, now.tv_nsec / 1000);
    say(instances[number].connection, event);
}

static void end(int number)
{
    char path[NAME_SIZE];

    path_of(number, ".kvmd", path);
    drop(&instances[number].connection);
    drop(&instances[number].listener);
    unlink(path);
}

/* As Ganeti does when it has taken note. */
static void remove_shutdown_file(int number)
{
    char path[NAME_SIZE];

    path_of(number, ".shutdown", path);
    unlink(path);
}

/* Serve until all of a range are negotiated with, or all have their file. */

static int64_t *negotiation_of(int number)
{
    return &instances[number].negotiated;
}

static int64_t *file_of(int number)
{
    return &instances[number].filed;
}

static int await_all(int64_t *(*fact)(int), int first, int count, int64_t deadline)
{
    int happened = 0;

    for (int number = first; number < first + count; number++)
        happened += serve_until(fact(number), deadline);
    return happened;
}

static int64_t latest(int64_t *(*fact)(int), int first, int count)
{
    int64_t last = -1;

    for (int number = first; number < first + count; number++)
        if (*fact(number) > last)
            last = *fact(number);
    return last;
}

/* The commands. */

static void answer(int64_t value)
{
    printf("%ld ", value);
}

static void listen_all(int first, int count)
{
    for (int number = first; number < first + count; number++)
        start(number, 0);
}

static void command_listen(int first, int count)
{
    listen_all(first, count);
    answer(0);
}

static void command_wait(int first, int count, int timeout_ms)
{
    int64_t earliest = INT64_MAX;

    answer(await_all(negotiation_of, first, count, monotonic_ns() + timeout_ms * MS));
    for (int number = first; number < first + count; number++)
        if (instances[number].negotiated != -1 &&
            instances[number].negotiated < earliest)
            earliest = instances[number].negotiated;
    answer(earliest == INT64_MAX ? -1 : earliest);
    answer(latest(negotiation_of, first, count));
}

static void command_create(int first, int count, int timeout_ms)
{
    int64_t begin = monotonic_ns();

    for (int number = first; number < first + count; number++) {
        start(number, 0);
        serve(0);
    }
    answer(await_all(negotiation_of, first, count, begin + timeout_ms * MS));
    answer(latest(negotiation_of, first, count) - begin);
}

static void command_discover(int first, int count, int patience_ms)
{
    for (int number = first; number < first + count; number++) {
        serve_for(PAUSE + rand() % PAUSE);
        start(number, SHORTEST_GAP + rand() % (LONGEST_GAP - SHORTEST_GAP));
        serve_until(&instances[number].negotiated, monotonic_ns() + patience_ms * MS);
    }
    await_all(negotiation_of, first, count, monotonic_ns() + LONG_ENOUGH);
    for (int number = first; number < first + count; number++) {
        struct instance *instance = &instances[number];

        answer(instance->negotiated == -1 ? -1
                                          : instance->negotiated - instance->listened);
        end(number);
    }
}

static void command_verdict(int first, int count, int limit_ms)
{
    static int64_t times[MAX_INSTANCES];
    int64_t deadline = monotonic_ns() + limit_ms * MS;
    int late = 0, measured = 0;

    for (int number = first; number < first + count && monotonic_ns() < deadline;
         number++) {
        int64_t *filed = &instances[number].filed, begin;

        serve_for(PAUSE + rand() % PAUSE);
        if (instances[number].connection == -1)
            continue;
        begin = monotonic_ns();
        send_shutdown(number);
        late += !serve_until(filed, begin + END_OF_CONNECTION);
        end(number);
        serve_until(filed, begin + limit_ms * MS);
        remove_shutdown_file(number);
        times[measured++] = *filed == -1 ? -1 : *filed - begin;
    }
    answer(late);
    for (int i = 0; i < measured; i++)
        answer(times[i]);
}

static void command_shutdown(int first, int count, int timeout_ms)
{
    int64_t begin = monotonic_ns();

    for (int number = first; number < first + count; number++) {
        if (instances[number].connection != -1)
            send_shutdown(number);
        end(number);
        serve(0);
    }
    answer(await_all(file_of, first, count, begin + timeout_ms * MS));
    answer(latest(file_of, first, count) - begin);
}

/* Send more of an endless row of events; return how much was taken. */
static int64_t send_events(int fd, int64_t sent, int64_t left)
{
    size_t offset = sent % EVENT_SIZE, length = BLOCK_SIZE - offset;
    ssize_t taken;

    if ((int64_t)length > left)
        length = left;
    taken = send(fd, block + offset, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (taken == -1 && errno != EAGAIN)
        err(1, "the daemon has closed a connection");
    return taken == -1 ? 0 : taken;
}

static bool is_taken(int fd)
{
    int unread = 0;

    return ioctl(fd, SIOCOUTQ, &unread) == -1 || unread == 0;
}

static void command_events(int first, int count, int each)
{
    static int64_t sent[MAX_INSTANCES];
    int64_t begin = monotonic_ns(), total = each * EVENT_SIZE;
    bool done = false;

    memset(sent, 0, sizeof sent);
    while (!done) {
        int64_t progress = 0;

        done = true;
        for (int number = first; number < first + count; number++) {
            int fd = instances[number].connection;
            int64_t taken;

            if (fd == -1)
                continue;
            taken = send_events(fd, sent[number], total - sent[number]);
            sent[number] += taken;
            progress += taken;
            done &= sent[number] == total && is_taken(fd);
        }
        if (progress == 0)
            usleep(500);
    }
    answer(monotonic_ns() - begin);
}

static void command_flood(int number)
{
    flood->bytes = 0;
    flooder = fork();
    if (flooder == -1)
        err(1, "fork");
    if (flooder == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
            ssize_t taken = send(instances[number].connection, block, BLOCK_SIZE, 0);

            if (taken == -1)
                _exit(1);
            flood->bytes += taken;
        }
    }
    answer(0);
}

/* A space may stand before a message, so that it is the start of a line. */
static void command_trickle(int first, int count, int interval_ms)
{
    flooder = fork();
    if (flooder == -1)
        err(1, "fork");
    if (flooder == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
            for (int number = first; number < first + count; number++)
                send(instances[number].connection, " ", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
            usleep(interval_ms * 1000);
        }
    }
    answer(0);
}

static void command_flooded(void)
{
    answer(flood->bytes);
    answer(monotonic_ns());
}

static void command_calm(void)
{
    kill(flooder, SIGKILL);
    waitpid(flooder, NULL, 0);
    answer(0);
}

/* Lets instances live in waves; one that is not discovered does not count as a life. */
static void command_lives(int first, int count, int parallel)
{
    int end_of_wave = first + parallel;
    int lived = 0, missed = 0;

    while (lived < count && missed < count) {
        listen_all(first, parallel);
        missed += parallel - await_all(negotiation_of, first, parallel,
                                       monotonic_ns() + WAVE_PATIENCE);
        for (int number = first; number < end_of_wave; number++)
            if (instances[number].connection != -1)
                send_shutdown(number);
        serve_for(END_OF_CONNECTION);
        for (int number = first; number < end_of_wave; number++)
            end(number);
        lived += await_all(file_of, first, parallel, monotonic_ns() + WAVE_PATIENCE);
        for (int number = first; number < end_of_wave; number++)
            remove_shutdown_file(number);
    }
    answer(lived);
    answer(missed);
}

static void obey(const char *line)
{
    char command[16] = "";
    int a = 0, b = 0, c = 0;

    sscanf(line, "%15s %d %d %d", command, &a, &b, &c);
    if (strcmp(command, "listen") == 0)
        command_listen(a, b);
    else if (strcmp(command, "wait") == 0)
        command_wait(a, b, c);
    else if (strcmp(command, "create") == 0)
        command_create(a, b, c);
    else if (strcmp(command, "discover") == 0)
        command_discover(a, b, c);
    else if (strcmp(command, "verdict") == 0)
        command_verdict(a, b, c);
    else if (strcmp(command, "shutdown") == 0)
        command_shutdown(a, b, c);
    else if (strcmp(command, "events") == 0)
        command_events(a, b, c);
    else if (strcmp(command, "flood") == 0)
        command_flood(a);
    else if (strcmp(command, "trickle") == 0)
        command_trickle(a, b, c);
    else if (strcmp(command, "flooded") == 0)
        command_flooded();
    else if (strcmp(command, "calm") == 0)
        command_calm();
    else if (strcmp(command, "lives") == 0)
        command_lives(a, b, c);
    else
        errx(2, "unknown command: %s", line);
    printf("\n");
    fflush(stdout);
}

static void raise_descriptor_limit(void)
{
    struct rlimit files;

    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
}

int main(int argc, char **argv)
{
    char line[256];

    if (argc != 2)
        errx(2, "usage: load CONTROL-DIR");
    if (chdir(argv[1]) == -1)
        err(1, "%s", argv[1]);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    raise_descriptor_limit();
    for (size_t i = 0; i < BLOCK_SIZE; i += EVENT_SIZE)
        memcpy(block + i, EVENT, EVENT_SIZE);
    for (int number = 0; number < MAX_INSTANCES; number++)
        instances[number].listener = instances[number].connection = -1;
    flood = mmap(NULL, sizeof *flood, PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    inotify = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (epoll == -1 || inotify_add_watch(inotify, ".", IN_CREATE) == -1)
        err(1, "inotify");
    watch(inotify, DIRECTORY, 0);
    while (fgets(line, sizeof line, stdin) != NULL)
        obey(line);
    return 0;
}
