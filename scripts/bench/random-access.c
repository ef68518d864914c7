// Reads words all over 256 MiB, each place depending on the last, and prints how long that took in ms.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(void) {
    const uint32_t words = 64u << 20;
    uint32_t *memory = malloc((size_t)words * 4);
    for (uint32_t at = 0; at < words; at++) memory[at] = at * 2654435761u + 12345u;
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    uint32_t at = 1;
    for (int step = 0; step < 3000000; step++) at = memory[at % words];
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("RESULT %ld %u\n", (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000, at);
}
