/* Preloaded beneath Python, Rust and C++ alike: counts what a process does to files below one folder, and at one of
 * these operations kills it, signals it or lets the operation fail; or writes down all of them, with a copy of what every
 * fsync brought to the disk. Calls that the C library makes to itself (fwrite) are not seen. One thread at a time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READ = 1, OPEN = 2, WRITE = 4, SYNC = 8, RENAME = 16, REMOVE = 32, MAKE = 64, FOLDER = 128 }; /* FOLDER: sync of one */
enum { LONGEST = 4096, FILES = 65536 };

static struct {
    char root[LONGEST], store[LONGEST];
    unsigned mask;          /* which kinds count */
    long at, count;         /* the operation that meets its fate; those seen */
    int signal, failure;    /* 0, or what is sent before it; 0, or the errno it ends with */
    int from_there_on;      /* later ones fail as well */
    int record;             /* descriptor of the record, or -1 */
} plan = {.record = -1};
static int armed;
static char inside[FILES]; /* descriptors of files below the root */

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void torture_arm(const char *root, unsigned mask, long at, int signal, int failure, int from_there_on, int record,
                 const char *store) {
    snprintf(plan.root, LONGEST, "%s/", root);
    snprintf(plan.store, LONGEST, "%s", store ? store : "");
    plan.mask = mask, plan.at = at, plan.count = 0, plan.signal = signal, plan.failure = failure;
    plan.from_there_on = from_there_on, plan.record = record, armed = 1;
}

long torture_count(void) { return plan.count; }

static int is_below(const char *whole) { /* or the root itself */
    size_t length = strlen(plan.root) - 1;
    return strncmp(whole, plan.root, length) == 0 && (whole[length] == '/' || !whole[length]);
}

/* Absolute path of `path` relative to `folder`; 1 where it lies below the root. */
static int resolved(int folder, const char *path, char *whole) {
    char base[LONGEST] = "";
    if (path[0] == '/') {
        snprintf(whole, LONGEST, "%s", path);
    } else {
        char link[64];
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
        if ((size_t)snprintf(whole, LONGEST, "%s/%s", base, path) >= LONGEST) return 0;
    }
    return armed && is_below(whole);
}

static int mine(int fd) { return armed && fd >= 0 && fd < FILES && inside[fd]; }

static int due(unsigned kind) { return (plan.mask & kind) && plan.count == plan.at; }

/* Counts one operation; -1 where it has to fail. */
static int fails(unsigned kind) {
    if (!(plan.mask & kind)) return 0;
    long now = plan.count++;
    if (plan.at < 0 || now < plan.at || (now > plan.at && !plan.from_there_on)) return 0;
    if (plan.signal && now == plan.at) kill(getpid(), plan.signal);
    if (plan.failure) errno = plan.failure;
    return plan.failure ? -1 : 0;
}

static void note(const char *what, unsigned long inode, const char *path, const char *other) {
    if (plan.record >= 0) {
        int before = errno;
        size_t root = strlen(plan.root), length = strlen(path);
        dprintf(plan.record, "%s\t%ld\t%lu\t%s\t%s\n", what, plan.count, inode, path + (root < length ? root : length),
                other);
        errno = before;
    }
}

/* Copies what a file holds when it is synced; a folder has only its name written down. */
static void synced(int fd) {
    if (plan.record < 0) return;
    struct stat about;
    char link[64], path[LONGEST] = "", copy[LONGEST + 32], block[65536];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0 || fstat(fd, &about)) return;
    if (S_ISREG(about.st_mode)) {
        snprintf(copy, sizeof copy, "%s/%ld", plan.store, plan.count);
        int from = REAL(open)(link, O_RDONLY), to = REAL(open)(copy, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        for (ssize_t n; (n = read(from, block, sizeof block)) > 0;)
            if (REAL(write)(to, block, n) != n) abort();
        close(from), close(to);
    }
    note("sync", about.st_ino, path, "");
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char whole[LONGEST];
    int below = resolved(folder, path, whole);
    int changes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);
    if (below && fails(changes ? OPEN : READ)) return -1;
    int fresh = below && (flags & O_CREAT) && faccessat(folder, path, F_OK, AT_SYMLINK_NOFOLLOW) != 0;
    int fd = REAL(openat)(folder, path, flags, mode);
    if (fd >= 0 && fd < FILES) inside[fd] = below;
    struct stat about;
    if (fd >= 0 && fresh && !(flags & O_DIRECTORY) && !fstat(fd, &about)) note("create", about.st_ino, whole, "");
    return fd;
}

#define OPENS(name, arguments, folder)                    \
    int name arguments {                                  \
        va_list more;                                     \
        va_start(more, flags);                            \
        mode_t mode = va_arg(more, int);                  \
        va_end(more);                                     \
        return opened(folder, path, flags, mode);         \
    }
OPENS(open, (const char *path, int flags, ...), AT_FDCWD)
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD)
OPENS(openat, (int folder, const char *path, int flags, ...), folder)
OPENS(openat64, (int folder, const char *path, int flags, ...), folder)

/* A kill at a write leaves half of it behind. */
ssize_t write(int fd, const void *bytes, size_t size) {
    if (mine(fd)) {
        if (due(WRITE) && plan.signal == SIGKILL && REAL(write)(fd, bytes, size / 2) < 0) return -1;
        if (fails(WRITE)) return -1;
    }
    return REAL(write)(fd, bytes, size);
}

#define CHANGES(type, name, kind, arguments, passed) \
    type name arguments {                            \
        if (mine(fd) && fails(kind)) return -1;      \
        return REAL(name) passed;                    \
    }
CHANGES(ssize_t, writev, WRITE, (int fd, const struct iovec *parts, int n), (fd, parts, n))
CHANGES(ssize_t, pwrite, WRITE, (int fd, const void *b, size_t n, off_t where), (fd, b, n, where))
CHANGES(ssize_t, pwrite64, WRITE, (int fd, const void *b, size_t n, off64_t where), (fd, b, n, where))
CHANGES(int, ftruncate, WRITE, (int fd, off_t size), (fd, size))
CHANGES(int, ftruncate64, WRITE, (int fd, off64_t size), (fd, size))

#define SYNCS(name)                             \
    int name(int fd) {                          \
        if (!mine(fd)) return REAL(name)(fd);   \
        struct stat about;                      \
        int folder = !fstat(fd, &about) && S_ISDIR(about.st_mode); \
        if (fails(folder ? FOLDER : SYNC)) return -1;             \
        int status = REAL(name)(fd);            \
        if (!status) synced(fd);                \
        return status;                          \
    }
SYNCS(fsync)
SYNCS(fdatasync)

static int renamed(int from, const char *old, int to, const char *new) {
    char a[LONGEST], b[LONGEST];
    int below = resolved(from, old, a) | resolved(to, new, b);
    if (below && fails(RENAME)) return -1;
    int status = REAL(renameat)(from, old, to, new);
    if (below && !status) note("rename", 0, a, b + strlen(plan.root));
    return status;
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new); }

static int removed(int folder, const char *path, int flags) {
    char whole[LONGEST];
    int below = resolved(folder, path, whole);
    if (below && fails(REMOVE)) return -1;
    int status = REAL(unlinkat)(folder, path, flags);
    if (below && !status) note("remove", 0, whole, "");
    return status;
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int folder, const char *path, int flags) { return removed(folder, path, flags); }

static int made(int folder, const char *path, mode_t mode) {
    char whole[LONGEST];
    int below = resolved(folder, path, whole);
    if (below && fails(MAKE)) return -1;
    int status = REAL(mkdirat)(folder, path, mode);
    if (below && !status) note("folder", 0, whole, "");
    return status;
}
int mkdir(const char *path, mode_t mode) { return made(AT_FDCWD, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { return made(folder, path, mode); }
