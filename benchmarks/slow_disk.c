/* LD_PRELOAD: a disk on which every sync takes as many milliseconds as the file SLOW_DISK_FILE says, 0 when it is not there. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static void wait_for_disk(void)
{
    const char *path = getenv("SLOW_DISK_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    unsigned milliseconds = 0;
    if (!file)
        return;
    if (fscanf(file, "%u", &milliseconds) == 1)
        usleep(milliseconds * 1000);
    fclose(file);
}

int fsync(int descriptor)
{
    wait_for_disk();
    return (int)syscall(SYS_fsync, descriptor);
}

int fdatasync(int descriptor)
{
    wait_for_disk();
    return (int)syscall(SYS_fdatasync, descriptor);
}
