"""The .exe function of these tests, and a look at whether its tree is alive."""

from __future__ import annotations

import time
from pathlib import Path

# Says what it was given; with "tree" it starts itself again and both go on until they are killed,
# each writing the time into a file of its own.
SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

static void beat(const char *file)
{
    for (int n = 0;; n++) {
        FILE *out = fopen(file, "w");
        if (out) { fprintf(out, "%d", n); fclose(out); }
        Sleep(50);
    }
}

int main(int argc, char **argv)
{
    if (argc > 2 && !strcmp(argv[1], "beat")) beat(argv[2]);
    if (argc > 2 && !strcmp(argv[1], "tree")) {
        char line[2048], file[1024];
        STARTUPINFOA startup = {sizeof startup};
        PROCESS_INFORMATION made;
        snprintf(line, sizeof line, "\"%s\" beat \"%s.child\"", argv[0], argv[2]);
        if (!CreateProcessA(NULL, line, NULL, NULL, FALSE, DETACHED_PROCESS | CREATE_NEW_PROCESS_GROUP, NULL, NULL,
                            &startup, &made)) return 99;
        snprintf(file, sizeof file, "%s.parent", argv[2]);
        beat(file);
    }
    for (int n = 1; n < argc; n++) printf("[%s]", argv[n]);
    return argc > 1 ? atoi(argv[1]) : 0;
}
"""


def assert_still(files: list[Path]) -> None:
    """Nobody writes into them any more."""
    before = [file.read_text() for file in files]
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert [file.read_text() for file in files] == before
