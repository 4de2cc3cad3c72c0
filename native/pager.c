/* A pager's threads, and its end. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define STACK (256u << 10)

int pager_running(struct imagefs_pager *pager)
{
    return __atomic_load_n(&pager->status, __ATOMIC_ACQUIRE) == IMAGEFS_PAGER_RUNNING;
}

static void signal_fd(int fd)
{
    uint64_t one = 1;

    /* Fails only if the counter is full, and then it is readable. */
    if (write(fd, &one, sizeof one) < 0)
        return;
}

/* Nothing else of this process can be relied on: a thread that waits for a page may hold any lock. */
static void end_process(const struct imagefs_pager *pager)
{
    struct sigaction plainly = {.sa_handler = SIG_DFL};

    if (dprintf(STDERR_FILENO, "imagefs: fault helper: %s\n", pager->failure.text) < 0 ||
        sigaction(pager->options.failure_signal, &plainly, NULL) || kill(getpid(), pager->options.failure_signal))
        _exit(1);
}

/* The first end counts. Requires: `lock` held. */
static int end_locked(struct imagefs_pager *pager, int status)
{
    if (!pager_running(pager))
        return 0;
    __atomic_store_n(&pager->status, status, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&pager->work);
    signal_fd(pager->wake_fd);
    signal_fd(pager->ended_fd);
    return 1;
}

void pager_end(struct imagefs_pager *pager, int status)
{
    pthread_mutex_lock(&pager->lock);
    end_locked(pager, status);
    pthread_mutex_unlock(&pager->lock);
}

static void fail(struct imagefs_pager *pager, struct imagefs_pager_failure failure, const char *what)
{
    int error = failure.error;
    uint64_t page = failure.page;

    if (page == NO_PAGE)
        snprintf(failure.text, sizeof failure.text, "%s%s%s", what, error ? ": " : "", error ? strerror(error) : "");
    else
        snprintf(failure.text, sizeof failure.text, "page %llu: %s%s%s", (unsigned long long)page, what,
                 error ? ": " : "", error ? strerror(error) : "");
    pthread_mutex_lock(&pager->lock);
    if (pager_running(pager)) {
        pager->failure = failure;
        end_locked(pager, IMAGEFS_PAGER_FAILED);
        if (pager->options.failure_signal)
            end_process(pager);
    }
    pthread_mutex_unlock(&pager->lock);
}

void pager_fail(struct imagefs_pager *pager, int error, uint64_t page, const char *format, ...)
{
    char what[128];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    fail(pager, (struct imagefs_pager_failure){.error = error, .page = page}, what);
}

void pager_fail_reading(struct imagefs_pager *pager, int error, uint64_t page)
{
    struct imagefs_pager_failure failure = {.error = error, .page = page, .reading = error != ENODATA};

    fail(pager, failure, error == ENODATA ? "memory ends before it" : "it cannot be read");
}

static void close_fd(int fd)
{
    if (fd > 0)
        close(fd);
}

static void free_faults(struct pager_fault *list)
{
    while (list) {
        struct pager_fault *next = list->next;

        free(list);
        list = next;
    }
}

static void free_pager(struct imagefs_pager *pager)
{
    const struct imagefs_pager_options *own = &pager->options;
    const int fds[] = {own->uffd, own->memory_fd, own->cache_fd, own->arrivals_fd, own->trace_fd, pager->wake_fd,
                       pager->ended_fd};

    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        close_fd(fds[i]);
    for (unsigned i = 0; i < pager->child_count; i++)
        close_fd(pager->children[i]);
    if (pager->state)
        munmap(pager->state, pager->state_size);
    if (pager->present)
        munmap((void *)(uintptr_t)pager->present, pager->present_size);
    if (pager->zeros)
        munmap(pager->zeros, 512 * PAGE);
    free((void *)(uintptr_t)own->order);
    free_faults(pager->queue);
    free_faults(pager->fetching);
    pthread_cond_destroy(&pager->left);
    pthread_cond_destroy(&pager->work);
    pthread_mutex_destroy(&pager->lock);
    pthread_rwlock_destroy(&pager->changes);
    free(pager);
}

int imagefs_pager_destroy(struct imagefs_pager *pager, int milliseconds)
{
    struct timespec until;
    int error = 0, left;

    if (pager == NULL)
        return 1;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += milliseconds % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    pthread_mutex_lock(&pager->lock);
    end_locked(pager, IMAGEFS_PAGER_STOPPED);
    while (pager->threads && error != ETIMEDOUT)
        error = pthread_cond_timedwait(&pager->left, &pager->lock, &until);
    left = pager->threads != 0;
    pager->disowned = 1;
    pthread_mutex_unlock(&pager->lock);
    if (!left)
        free_pager(pager);
    return !left;
}

struct job {
    struct imagefs_pager *pager;
    void *(*body)(void *);
};

static void *run_thread(void *argument)
{
    struct job job = *(struct job *)argument;
    int last;

    free(argument);
    job.body(job.pager);
    pthread_mutex_lock(&job.pager->lock);
    last = --job.pager->threads == 0 && job.pager->disowned;
    pthread_cond_signal(&job.pager->left);
    pthread_mutex_unlock(&job.pager->lock);
    if (last)
        free_pager(job.pager);
    return NULL;
}

static int start_threads(struct imagefs_pager *pager, void *(*body)(void *), uint32_t count)
{
    pthread_attr_t detached;
    int error = 0;

    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&detached, STACK);
    for (uint32_t i = 0; i < count && !error; i++) {
        struct job *job = malloc(sizeof *job);
        pthread_t thread;

        if (job == NULL) {
            error = ENOMEM;
            break;
        }
        *job = (struct job){pager, body};
        pthread_mutex_lock(&pager->lock);
        error = pthread_create(&thread, &detached, run_thread, job);
        pager->threads += !error;
        pthread_mutex_unlock(&pager->lock);
        if (error)
            free(job);
    }
    pthread_attr_destroy(&detached);
    return error;
}

int imagefs_pager_start(struct imagefs_pager *pager)
{
    const struct imagefs_pager_options *own = &pager->options;
    int error = start_threads(pager, pager_fetcher, own->fetch_threads);

    if (!error)
        error = start_threads(pager, pager_events, own->event_threads);
    if (!error && own->ahead)
        error = start_threads(pager, pager_ahead, 1);
    if (!error && own->trace_fd >= 0)
        error = start_threads(pager, pager_tracer, 1);
    return error;
}

void imagefs_pager_stop(struct imagefs_pager *pager)
{
    pager_end(pager, IMAGEFS_PAGER_STOPPED);
}

int imagefs_pager_ended_fd(const struct imagefs_pager *pager)
{
    return pager->ended_fd;
}

enum imagefs_pager_status imagefs_pager_get_status(struct imagefs_pager *pager)
{
    return (enum imagefs_pager_status)__atomic_load_n(&pager->status, __ATOMIC_ACQUIRE);
}

void imagefs_pager_get_statistics(struct imagefs_pager *pager, struct imagefs_pager_statistics *out)
{
    uint64_t *to = (uint64_t *)out;
    const uint64_t *from = (const uint64_t *)&pager->state->counters;

    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

int imagefs_pager_get_failure(struct imagefs_pager *pager, struct imagefs_pager_failure *out)
{
    int failed;

    pthread_mutex_lock(&pager->lock);
    failed = imagefs_pager_get_status(pager) == IMAGEFS_PAGER_FAILED;
    if (failed)
        *out = pager->failure;
    pthread_mutex_unlock(&pager->lock);
    return failed;
}
