/* Counts the primes below its argument. Build: cc -O2 -static -o primes primes.c */
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    long limit = argc > 1 ? strtol(argv[1], NULL, 10) : 1000, count = 0;
    if (limit < 0) {
        fprintf(stderr, "usage: primes [LIMIT]\n");
        return 2;
    }
    for (long n = 2; n < limit; n++) {
        long d = 2;
        while (d * d <= n && n % d) d++;
        if (d * d > n) count++;
    }
    printf("%ld primes below %ld\n", count, limit);
    return 0;
}
