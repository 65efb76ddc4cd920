/* A server that answers by the clock, to measure what benchmark clients make of it.
 *
 *   cc -O2 -o timetable_server timetable_server.c
 *   ./timetable_server PORT        (port 0: any; the port is printed)
 *
 * A request that was read whole at time t gets token k at t + ttft + k * itl, each in a chunk and a
 * packet of its own, and /admin/stats says when they really went out: that is the truth a client is
 * compared with; "sent" in each event says it, too (ns since 1970). One thread, one epoll, the last 0.1 ms before a deadline are spent spinning.
 *
 *   GET /admin/config?ttft_ms=50&itl_ms=10     sets the timetable, and forgets the statistics
 *   GET /admin/stats                           what was sent
 *   POST /v1/completions, /v1/chat/completions (streaming only), GET /v1/models, /health
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_FDS = 65536, MOST_US = 2000000, INPUT = 1 << 20, SPIN_NS = 100000, AT_ONCE = 256 };

typedef long long ns;

struct connection {
    char *input;
    size_t length, capacity;
    ns arrived, start, last; /* of the request; arrived = 0: there is none */
    int tokens, sent, prompt_tokens;
    bool chat, usage;
};

struct deadline {
    ns at;
    int fd;
};

struct histogram {
    unsigned bucket[MOST_US + 1]; /* one a microsecond */
    long long count;
    double sum;
};

static struct connection connections[MOST_FDS];
static struct deadline heap[MOST_FDS]; /* a connection has one deadline at most */
static int heap_size, epoll_fd;
static ns ttft = 50000000, itl = 10000000, first_at, last_at;
static struct histogram ttfts, itls;
static long long finished;

static ns time_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static ns now(void) { return time_of(CLOCK_MONOTONIC); }

/* ---- deadlines: a binary heap, the next one first ---- */

static void swap(int a, int b) {
    struct deadline t = heap[a];
    heap[a] = heap[b];
    heap[b] = t;
}

static void push(ns at, int fd) {
    int i = heap_size++;
    heap[i] = (struct deadline){at, fd};
    for (; i && heap[(i - 1) / 2].at > heap[i].at; i = (i - 1) / 2) swap(i, (i - 1) / 2);
}

static void sink(int i) {
    for (;;) {
        int child = 2 * i + 1;
        if (child + 1 < heap_size && heap[child + 1].at < heap[child].at) child++;
        if (child >= heap_size || heap[i].at <= heap[child].at) return;
        swap(i, child);
        i = child;
    }
}

static int pop(void) {
    int fd = heap[0].fd;
    heap[0] = heap[--heap_size];
    sink(0);
    return fd;
}

static void forget_deadline(int fd) { /* rare: a client left in the middle */
    for (int i = 0; i < heap_size; i++)
        if (heap[i].fd == fd) {
            heap[i] = heap[--heap_size];
            break;
        }
    for (int i = heap_size / 2; i >= 0; i--) sink(i);
}

/* ---- statistics ---- */

static void note(struct histogram *h, ns value) {
    ns us = (value + 500) / 1000;
    h->bucket[us < MOST_US ? us : MOST_US]++;
    h->count++;
    h->sum += value / 1e6;
}

static double quantile(const struct histogram *h, double q) {
    long long wanted = q * h->count, seen = 0;
    for (int us = 0; us <= MOST_US; us++)
        if ((seen += h->bucket[us]) > wanted) return us / 1000.0;
    return 0;
}

static int describe(char *out, const char *name, const struct histogram *h) {
    return sprintf(out, "\"%s\":{\"count\":%lld,\"mean\":%.4f,\"p50\":%.3f,\"p99\":%.3f}", name,
                   h->count, h->count ? h->sum / h->count : 0, quantile(h, .5), quantile(h, .99));
}

static void forget_statistics(void) {
    memset(&ttfts, 0, sizeof ttfts);
    memset(&itls, 0, sizeof itls);
    finished = first_at = last_at = 0;
}

/* ---- answers ---- */

static void leave(int fd) {
    struct connection *c = &connections[fd];
    if (c->arrived) forget_deadline(fd);
    c->arrived = 0;
    c->length = 0;
    close(fd);
}

static bool put(int fd, const char *data, size_t length) {
    if (send(fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)length) return true;
    leave(fd); /* gone, or so slow that its socket is full */
    return false;
}

static void put_document(int fd, const char *status, const char *body) {
    char out[4096];
    int n = snprintf(out, sizeof out,
                     "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     status, strlen(body), body);
    put(fd, out, n);
}

static int chunk(char *out, const char *data) {
    return sprintf(out, "%zx\r\n%s\r\n", strlen(data), data);
}

static int token_event(char *out, const struct connection *c, int k) {
    const char *reason = k + 1 == c->tokens ? "\"length\"" : "null";
    if (c->chat)
        return sprintf(out,
                       "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\","
                       "\"created\":1700000000,\"model\":\"timetable\",\"choices\":[{\"index\":0,\"delta\":"
                       "{\"role\":\"assistant\",\"content\":\" token\"},\"finish_reason\":%s}],\"sent\":%lld}\n\n",
                       reason, time_of(CLOCK_REALTIME));
    return sprintf(out,
                   "data: {\"id\":\"cmpl-0123456789abcdef\",\"object\":\"text_completion\",\"created\":"
                   "1700000000,\"model\":\"timetable\",\"choices\":[{\"index\":0,\"text\":\" token\","
                   "\"logprobs\":null,\"finish_reason\":%s}],\"sent\":%lld}\n\n",
                   reason, time_of(CLOCK_REALTIME));
}

static void put_end(int fd) {
    struct connection *c = &connections[fd];
    char event[512], out[1024];
    int n = 0;
    if (c->usage) {
        sprintf(event,
                "data: {\"model\":\"timetable\",\"choices\":[],\"usage\":{\"prompt_tokens\":%d,"
                "\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n",
                c->prompt_tokens, c->tokens, c->prompt_tokens + c->tokens);
        n = chunk(out, event);
    }
    n += chunk(out + n, "data: [DONE]\n\n");
    n += sprintf(out + n, "0\r\n\r\n");
    c->arrived = 0;
    finished++;
    last_at = c->last;
    put(fd, out, n);
}

static void put_token(int fd) {
    static const char head[] =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    struct connection *c = &connections[fd];
    char event[512], out[1024];
    int n = 0, k = c->sent++;
    if (k == 0) n = sprintf(out, "%s", head);
    token_event(event, c, k);
    n += chunk(out + n, event);
    if (c->sent < c->tokens) push(c->start + c->sent * itl, fd);
    if (!put(fd, out, n)) return;
    ns t = now();
    if (k == 0)
        note(&ttfts, t - c->arrived);
    else
        note(&itls, t - c->last);
    c->last = t;
    if (c->sent == c->tokens) put_end(fd);
}

/* ---- requests ---- */

static int number(const char *text, const char *key, int otherwise) {
    const char *at = strstr(text, key);
    return at ? atoi(at + strlen(key)) : otherwise;
}

static bool truth(const char *text, const char *key) {
    const char *at = strstr(text, key);
    if (at) at += strlen(key) + strspn(at + strlen(key), " ");
    return at && !strncmp(at, "true", 4);
}

static int prompt_tokens(const char *body) {
    const char *at = strstr(body, "\"prompt\":[");
    int count = 1;
    for (at = at ? at + 10 : "]"; *at && *at != ']'; at++) count += *at == ',';
    return count;
}

static void configure(int fd, const char *line) {
    const char *value;
    if ((value = strstr(line, "ttft_ms="))) ttft = atof(value + 8) * 1e6;
    if ((value = strstr(line, "itl_ms="))) itl = atof(value + 7) * 1e6;
    forget_statistics();
    put_document(fd, "200 OK", "{}");
}

static void tell(int fd) {
    char out[1024];
    double span = (last_at - first_at) / 1e9;
    int n = sprintf(out, "{\"requests\":%lld,\"requests_per_s\":%.3f,", finished,
                    span > 0 ? finished / span : 0);
    n += describe(out + n, "ttft_ms", &ttfts);
    n += sprintf(out + n, ",");
    n += describe(out + n, "itl_ms", &itls);
    sprintf(out + n, "}");
    put_document(fd, "200 OK", out);
}

static void begin(int fd, const char *line, const char *body, ns t) {
    struct connection *c = &connections[fd];
    c->arrived = t;
    c->start = t + ttft;
    c->sent = 0;
    c->chat = strstr(line, "/chat/") != NULL;
    c->usage = truth(body, "\"include_usage\":");
    c->tokens = number(body, c->chat ? "\"max_completion_tokens\":" : "\"max_tokens\":", 16);
    c->prompt_tokens = prompt_tokens(body);
    if (!first_at) first_at = t;
    push(c->start, fd);
}

static void answer(int fd, const char *line, const char *body, ns t) {
    if (!strncmp(line, "POST /v1/", 9) && strstr(line, "completions"))
        begin(fd, line, body, t);
    else if (!strncmp(line, "GET /admin/config?", 18))
        configure(fd, line);
    else if (!strncmp(line, "GET /admin/stats", 16))
        tell(fd);
    else if (!strncmp(line, "GET /v1/models", 14))
        put_document(fd, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"timetable\"}]}");
    else
        put_document(fd, strncmp(line, "GET /health", 11) ? "404 Not Found" : "200 OK", "{}");
}

static void receive(int fd) {
    struct connection *c = &connections[fd];
    if (c->length + 65536 > c->capacity && c->capacity < INPUT)
        c->input = realloc(c->input, c->capacity = 2 * c->capacity + 65536);
    ssize_t n = recv(fd, c->input + c->length, c->capacity - c->length - 1, MSG_DONTWAIT);
    if (n <= 0) return leave(fd);
    c->input[c->length += n] = 0;
    char *body = strstr(c->input, "\r\n\r\n");
    if (!body || c->arrived) return;
    body += 4;
    const char *length = strcasestr(c->input, "content-length:");
    size_t whole = body - c->input + (length && length < body ? atol(length + 15) : 0);
    if (c->length < whole) return;
    ns t = now();
    c->length = 0; /* no client of ours sends the next request before this one's answer */
    answer(fd, c->input, body, t);
}

/* ---- the loop ---- */

static void watch(int fd) {
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
}

static void welcome(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(fd);
    }
}

static void wait_for_work(void) {
    ns left = heap_size ? heap[0].at - now() - SPIN_NS : 1000000000;
    if (left < 0) left = 0;
    struct timespec t = {left / 1000000000, left % 1000000000};
    struct pollfd p = {.fd = epoll_fd, .events = POLLIN};
    ppoll(&p, 1, &t, NULL); /* epoll's own time-out counts whole milliseconds */
}

static int listen_on(int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&a, size) || listen(fd, 4096)) {
        perror("timetable_server");
        exit(1);
    }
    getsockname(fd, (struct sockaddr *)&a, &size);
    printf("%d\n", ntohs(a.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < MOST_FDS ? files.rlim_max : MOST_FDS;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1);
    prctl(PR_SET_PDEATHSIG, 15); /* it ends with the script that started it */
    epoll_fd = epoll_create1(0);
    int listener = listen_on(argc > 1 ? atoi(argv[1]) : 0);
    watch(listener);
    for (;;) {
        struct epoll_event events[512];
        wait_for_work();
        int n = epoll_wait(epoll_fd, events, 512, 0);
        for (int i = 0; i < n; i++)
            if (events[i].data.fd == listener)
                welcome(listener);
            else
                receive(events[i].data.fd);
        /* Then the sockets again: a request counts from when it was read. */
        for (int i = 0; i < AT_ONCE && heap_size && heap[0].at <= now(); i++) put_token(pop());
    }
}
