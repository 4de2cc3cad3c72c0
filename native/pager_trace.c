/* Hands first touches to `.imagefs/trace`, off the way of those who wait for pages. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <unistd.h>

#define PERIOD 100 /* milliseconds */
#define LINE 64
#define LINES 256u

/* 0 when there is no more. What a pager has written and not noted, when it dies, its heir writes again. */
static unsigned hand_over(struct imagefs_pager *pager)
{
    struct pager_state *state = pager->state;
    uint64_t noted = __atomic_load_n(&state->touches, __ATOMIC_ACQUIRE);
    uint64_t at = state->touches_handed;
    char text[LINE * LINES];
    int used = 0;
    unsigned lines = 0;

    for (; at < noted && lines < LINES; at++, lines++) {
        const struct pager_touch *touch = &state->touch[at % PAGER_TOUCHES];

        used += snprintf(text + used, LINE, "%.6f %llu 1 pager\n", touch->seconds, (unsigned long long)touch->page);
    }
    /* A trace is a hint: if the mount does not take it, it is lost. */
    for (int done = 0; done < used;) {
        ssize_t put = write(pager->options.trace_fd, text + done, (size_t)(used - done));

        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            break;
        done += (int)put;
    }
    __atomic_store_n(&state->touches_handed, at, __ATOMIC_RELEASE);
    return lines;
}

void *pager_tracer(void *argument)
{
    struct imagefs_pager *pager = argument;
    struct pollfd end = {pager->wake_fd, POLLIN, 0};

    while (pager_running(pager)) {
        poll(&end, 1, PERIOD);
        while (hand_over(pager))
            ;
    }
    return NULL;
}
