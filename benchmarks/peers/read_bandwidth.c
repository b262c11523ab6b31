/* Reads a buffer with some threads, again and again; prints the best rate in GB/s.
 * Usage: read_bandwidth THREADS MEGABYTES REPEATS */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define LANES 32 /* 64-bit sums at once, so that the loads and not the additions set the pace */

typedef struct {
    const uint64_t *data;
    size_t count;
    uint64_t sum;
} Part;

static void *read_part(void *argument) {
    Part *part = argument;
    uint64_t sums[LANES] = {0};
    for (size_t i = 0; i + LANES <= part->count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += part->data[i + lane];
    for (int lane = 0; lane < LANES; lane++) part->sum += sums[lane];
    return NULL;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int num_threads = atoi(argv[1]), repeats = atoi(argv[3]);
    size_t count = (size_t)atol(argv[2]) * 1000000 / sizeof(uint64_t);
    uint64_t *data = aligned_alloc(64, count * sizeof(uint64_t) / 64 * 64);
    pthread_t *threads = calloc(num_threads, sizeof *threads);
    Part *parts = calloc(num_threads, sizeof *parts);
    if (!data || !threads || !parts) return 1;
    for (size_t i = 0; i < count; i++) data[i] = i;
    double best = 0;
    uint64_t sum = 0;
    for (int repeat = 0; repeat < repeats; repeat++) {
        double start = now();
        for (int i = 0; i < num_threads; i++) {
            parts[i] = (Part){data + count / num_threads * i, count / num_threads, 0};
            if (pthread_create(&threads[i], NULL, read_part, &parts[i])) return 1;
        }
        for (int i = 0; i < num_threads; i++) {
            pthread_join(threads[i], NULL);
            sum += parts[i].sum;
        }
        double rate = count * sizeof(uint64_t) / (now() - start) / 1e9;
        if (rate > best) best = rate;
    }
    printf("%.2f\n", best);
    return sum == 1; /* the sum is used, so that the reads stay */
}
