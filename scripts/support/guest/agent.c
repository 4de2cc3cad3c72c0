/* The program of the test guest: memory that can be checked, and a few commands on the serial line.
 *
 * Started by the initramfs' /init as process 1. It fills a region with a pattern that is a pure function of
 * (seed, page, generation), so that every page can be checked without a copy of it, counts tenths of a second,
 * and answers one line per command on /dev/ttyS0:
 *
 *   at boot        READY nonce=<16 hex> vcpus=<n>        then, when the pattern is there,  FILLED pages=<n>
 *   every second   tick <count>
 *   ping X         pong X nonce=<16 hex> count=<n>       touches next to nothing: "does the guest live?"
 *   check          check ok pages=<n> writes=<n> nonce=… | check BAD page=<n> …   every page, one thread per vCPU
 *   touch N SEED   touch ok pages=<N> | touch BAD page=<n>     N pseudo-random pages, read and compared
 *   write N SEED   write ok pages=<N> writes=<total>           N pseudo-random pages get their next generation
 *   vcpus          vcpus <n>
 *   exit N         writes N to the isa-debug-exit device (iobase 0xf4): QEMU ends with status 2 N + 1
 *
 * check, touch and write run beside the loop, one at a time ("busy <command>" otherwise), so that pings are
 * answered while a long check waits for pages. The kernel command line gives imagefs.fill= (MiB),
 * imagefs.kind= (random, text, mixed) and imagefs.seed=.
 *
 * A boot nonce, drawn anew at every boot and held in memory only, tells a guest that went on from one that booted
 * again.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, TICK_MS = 100, MAX_THREADS = 64, EXIT_PORT = 0xf4 };
enum kind { RANDOM, TEXT, MIXED };

struct guest {
    int line;
    uint64_t nonce, seed, count;
    enum kind kind;
    unsigned vcpus;
    size_t pages;
    uint8_t *memory;       /* pages * PAGE bytes */
    uint32_t *generation;  /* of each page; apart from the pages, so that a stale page is not taken for a right one */
    uint64_t writes;       /* pages written after the fill; only jobs touch it, and there is one job at a time */
    pthread_mutex_t lock;  /* guards the line and busy */
    bool busy;
};

struct job {
    struct guest *guest;
    char verb[8];
    uint64_t amount, seed;
};

struct share {
    struct guest *guest;
    size_t first, end;
    bool fill;
    size_t bad; /* first page that is wrong, SIZE_MAX if none */
};

static uint64_t mix(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u); /* splitmix64 (Steele, Lea, Flood 2014) */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void vsay(struct guest *guest, bool job_ends, const char *format, va_list arguments)
{
    char text[200];
    int length = vsnprintf(text, sizeof text - 1, format, arguments);
    if (length < 0)
        abort();
    if (length > (int)sizeof text - 2)
        length = sizeof text - 2;
    text[length++] = '\n';
    pthread_mutex_lock(&guest->lock);
    if (job_ends)
        guest->busy = false; /* before its answer is out: who reads that may send the next command at once */
    for (int done = 0; done < length;) {
        ssize_t wrote = write(guest->line, text + done, length - done);
        if (wrote <= 0)
            break;
        done += wrote;
    }
    pthread_mutex_unlock(&guest->lock);
}

__attribute__((format(printf, 2, 3))) static void say(struct guest *guest, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsay(guest, false, format, arguments);
    va_end(arguments);
}

/* The answer of a job, and its end. */
__attribute__((format(printf, 2, 3))) static void finish(struct guest *guest, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsay(guest, true, format, arguments);
    va_end(arguments);
}

/* ---- the pattern ---- */

static void write_text(char *out, uint64_t *state)
{
    static const char *const words[32] = {
        "page", "frame", "memory", "guest", "the", "a", "of", "and", "suspend", "resume", "kernel", "while",
        "waits", "for", "arrives", "touch", "before", "after", "window", "chunk", "reads", "writes", "is", "not",
        "present", "host", "another", "store", "link", "slow", "fast", "restore",
    };
    for (int at = 0; at < PAGE;) {
        uint64_t draw = mix(state);
        for (int i = 0; i < 12 && at < PAGE; i++, draw >>= 5)
            for (const char *word = words[draw & 31]; at < PAGE; word++) {
                out[at++] = *word ? *word : ' ';
                if (!*word)
                    break;
            }
    }
}

static void make_page(const struct guest *guest, size_t page, uint32_t generation, uint64_t *out)
{
    uint64_t state = guest->seed ^ ((uint64_t)page << 24) ^ ((uint64_t)generation << 56);
    uint64_t draw = mix(&state);
    bool text = guest->kind == TEXT || (guest->kind == MIXED && (draw & 1));
    bool sparse = guest->kind == MIXED && (draw & 3) == 2;
    if (text)
        write_text((char *)out, &state);
    else {
        int filled = sparse ? 8 : WORDS;
        for (int i = 0; i < filled; i++)
            out[i] = mix(&state);
        memset(out + filled, 0, (WORDS - filled) * 8);
    }
    out[0] = page; /* who it is, for whoever looks at a dump */
    out[1] = generation;
}

static bool page_is_right(const struct guest *guest, size_t page)
{
    uint64_t wanted[WORDS];
    make_page(guest, page, guest->generation[page], wanted);
    return memcmp(wanted, guest->memory + page * PAGE, PAGE) == 0;
}

static void *work(void *argument)
{
    struct share *share = argument;
    struct guest *guest = share->guest;
    for (size_t page = share->first; page < share->end; page++) {
        if (share->fill)
            make_page(guest, page, 0, (uint64_t *)(guest->memory + page * PAGE));
        else if (!page_is_right(guest, page)) {
            share->bad = page;
            break;
        }
    }
    return NULL;
}

/* Walks all pages with one thread per vCPU; returns the first page that is wrong, or SIZE_MAX. */
static size_t walk(struct guest *guest, bool fill)
{
    pthread_t threads[MAX_THREADS];
    struct share shares[MAX_THREADS];
    size_t bad = SIZE_MAX;
    for (unsigned i = 0; i < guest->vcpus; i++) {
        shares[i] = (struct share){guest, guest->pages * i / guest->vcpus, guest->pages * (i + 1) / guest->vcpus, fill, SIZE_MAX};
        if (pthread_create(&threads[i], NULL, work, &shares[i]))
            abort();
    }
    for (unsigned i = 0; i < guest->vcpus; i++) {
        pthread_join(threads[i], NULL);
        if (shares[i].bad < bad)
            bad = shares[i].bad;
    }
    return bad;
}

/* ---- jobs ---- */

static void touch_or_write(struct guest *guest, const struct job *job)
{
    uint64_t state = job->seed;
    bool writes = strcmp(job->verb, "write") == 0;
    for (uint64_t i = 0; i < job->amount && guest->pages; i++) {
        size_t page = mix(&state) % guest->pages;
        if (!page_is_right(guest, page)) {
            finish(guest, "%s BAD page=%zu", job->verb, page);
            return;
        }
        if (writes) {
            make_page(guest, page, ++guest->generation[page], (uint64_t *)(guest->memory + page * PAGE));
            guest->writes++;
        }
    }
    finish(guest, "%s ok pages=%llu writes=%llu", job->verb, (unsigned long long)job->amount,
        (unsigned long long)guest->writes);
}

static void *run_job(void *argument)
{
    struct job *job = argument;
    struct guest *guest = job->guest;
    if (strcmp(job->verb, "fill") == 0) {
        walk(guest, true);
        finish(guest, "FILLED pages=%zu", guest->pages);
    } else if (strcmp(job->verb, "check") == 0) {
        size_t bad = walk(guest, false);
        if (bad == SIZE_MAX)
            finish(guest, "check ok pages=%zu writes=%llu nonce=%016llx", guest->pages, (unsigned long long)guest->writes,
                (unsigned long long)guest->nonce);
        else {
            const uint64_t *found = (const uint64_t *)(guest->memory + bad * PAGE);
            finish(guest, "check BAD page=%zu generation=%u found-page=%llx found-generation=%llx", bad,
                guest->generation[bad], (unsigned long long)found[0], (unsigned long long)found[1]);
        }
    } else
        touch_or_write(guest, job);
    free(job);
    return NULL;
}

static void start_job(struct guest *guest, const char *verb, uint64_t amount, uint64_t seed)
{
    pthread_mutex_lock(&guest->lock);
    bool busy = guest->busy;
    guest->busy = true;
    pthread_mutex_unlock(&guest->lock);
    if (busy) {
        say(guest, "busy %s", verb);
        return;
    }
    struct job *job = malloc(sizeof *job);
    pthread_t thread;
    if (!job)
        abort();
    *job = (struct job){.guest = guest, .amount = amount, .seed = seed};
    snprintf(job->verb, sizeof job->verb, "%s", verb);
    if (pthread_create(&thread, NULL, run_job, job))
        abort();
    pthread_detach(thread);
}

/* ---- the line ---- */

static void obey(struct guest *guest, const char *text)
{
    char verb[16] = "", word[64] = "";
    unsigned long long seed = 1;
    sscanf(text, "%15s %63s %llu", verb, word, &seed);
    if (strcmp(verb, "ping") == 0)
        say(guest, "pong %s nonce=%016llx count=%llu", word, (unsigned long long)guest->nonce,
            (unsigned long long)guest->count);
    else if (strcmp(verb, "check") == 0 || strcmp(verb, "touch") == 0 || strcmp(verb, "write") == 0)
        start_job(guest, verb, strtoull(word, NULL, 10), seed);
    else if (strcmp(verb, "vcpus") == 0)
        say(guest, "vcpus %u", guest->vcpus);
    else if (strcmp(verb, "exit") == 0 && ioperm(EXIT_PORT, 1, 1) == 0)
        outb(atoi(word), EXIT_PORT);
    else if (verb[0])
        say(guest, "unknown %s", verb);
}

static void listen_and_count(struct guest *guest)
{
    char text[256];
    size_t length = 0;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t next = now.tv_sec * 1000 + now.tv_nsec / 1000000 + TICK_MS;
    for (;;) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        int64_t left = next - (now.tv_sec * 1000 + now.tv_nsec / 1000000);
        if (left <= 0) {
            next += TICK_MS;
            if (++guest->count % (1000 / TICK_MS) == 0)
                say(guest, "tick %llu", (unsigned long long)guest->count);
            continue;
        }
        struct pollfd poller = {.fd = guest->line, .events = POLLIN};
        if (poll(&poller, 1, (int)left) <= 0)
            continue;
        char byte;
        while (read(guest->line, &byte, 1) == 1) {
            if (byte == '\n' || length == sizeof text - 1) {
                text[length] = 0;
                length = 0;
                obey(guest, text);
            } else if (byte != '\r')
                text[length++] = byte;
        }
    }
}

static void read_options(struct guest *guest)
{
    char options[4096] = "";
    size_t megabytes = 0;
    FILE *file = fopen("/proc/cmdline", "r");
    if (file) {
        if (!fgets(options, sizeof options, file))
            options[0] = 0;
        fclose(file);
    }
    for (char *word = strtok(options, " \n"); word; word = strtok(NULL, " \n")) {
        if (strncmp(word, "imagefs.fill=", 13) == 0)
            megabytes = strtoull(word + 13, NULL, 10);
        else if (strncmp(word, "imagefs.seed=", 13) == 0)
            guest->seed = strtoull(word + 13, NULL, 0);
        else if (strcmp(word, "imagefs.kind=text") == 0)
            guest->kind = TEXT;
        else if (strcmp(word, "imagefs.kind=mixed") == 0)
            guest->kind = MIXED;
    }
    guest->pages = megabytes << 8;
}

static void open_line(struct guest *guest)
{
    struct termios mode;
    guest->line = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (guest->line < 0 || tcgetattr(guest->line, &mode))
        abort();
    cfmakeraw(&mode);
    mode.c_cflag |= CLOCAL;
    mode.c_cc[VMIN] = 0; /* a read takes what is there and does not wait; poll waits */
    mode.c_cc[VTIME] = 0;
    cfsetspeed(&mode, B115200);
    tcsetattr(guest->line, TCSANOW, &mode);
}

static uint64_t draw_nonce(void)
{
    /* The pool of a guest without an entropy device may not be seeded yet, and waiting for it takes seconds. The
     * time stamp counter makes two boots differ even then. */
    uint64_t nonce = 0;
    if (getrandom(&nonce, sizeof nonce, GRND_INSECURE) != sizeof nonce)
        nonce = 0;
    uint64_t state = nonce ^ __builtin_ia32_rdtsc() ^ (uint64_t)time(NULL) << 32;
    return mix(&state);
}

int main(void)
{
    static struct guest guest = {.seed = 1, .lock = PTHREAD_MUTEX_INITIALIZER};
    open_line(&guest);
    read_options(&guest);
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    guest.vcpus = online < 1 ? 1 : online > MAX_THREADS ? MAX_THREADS : online;
    guest.nonce = draw_nonce();
    say(&guest, "READY nonce=%016llx vcpus=%u", (unsigned long long)guest.nonce, guest.vcpus);
    if (guest.pages) {
        guest.memory = mmap(NULL, guest.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        guest.generation = calloc(guest.pages, sizeof *guest.generation);
        if (guest.memory == MAP_FAILED || !guest.generation) {
            say(&guest, "no memory for %zu pages", guest.pages);
            guest.pages = 0;
        }
    }
    start_job(&guest, "fill", 0, 0);
    listen_and_count(&guest);
}
