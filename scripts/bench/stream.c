/* A TCP stream, for the benchmark `network`: `stream sink PORT` takes what comes on every connection, one after another,
 * and prints "ready" once it listens (0 lets the system choose a port, which is printed instead); `stream send ADDRESS
 * PORT MIB` sends so much, waits until the other side has taken all of it, and prints Mbit/s. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[256 << 10];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int fail(const char *what) {
    perror(what);
    return 1;
}

static int sink(struct sockaddr_in *address) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    socklen_t length = sizeof *address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (void *)address, length) || listen(listener, 8)) return fail("listen");
    if (address->sin_port) puts("ready");
    else if (getsockname(listener, (void *)address, &length)) return fail("getsockname");
    else printf("%d\n", ntohs(address->sin_port));
    fflush(stdout);
    for (;;) {
        int stream = accept(listener, 0, 0);
        if (stream < 0) return fail("accept");
        while (read(stream, buffer, sizeof buffer) > 0) {}
        close(stream);
    }
}

static int send_all(struct sockaddr_in *address, long mib) {
    int stream = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(stream, (void *)address, sizeof *address)) return fail("connect");
    double start = now();
    for (long left = mib << 20; left > 0;) {
        ssize_t sent = write(stream, buffer, left < (long)sizeof buffer ? (size_t)left : sizeof buffer);
        if (sent < 0) return fail("write");
        left -= sent;
    }
    shutdown(stream, SHUT_WR);
    if (read(stream, buffer, 1) != 0) return fail("read"); /* it closes when it has taken all */
    printf("%.0f\n", mib * 8.388608 / (now() - start));
    return 0;
}

int main(int count, char **words) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    if (count == 3 && !strcmp(words[1], "sink")) {
        address.sin_port = htons(atoi(words[2]));
        return sink(&address);
    }
    if (count == 5 && !strcmp(words[1], "send") && inet_pton(AF_INET, words[2], &address.sin_addr) == 1) {
        address.sin_port = htons(atoi(words[3]));
        return send_all(&address, atol(words[4]));
    }
    fprintf(stderr, "stream sink PORT | stream send ADDRESS PORT MIB\n");
    return 2;
}
