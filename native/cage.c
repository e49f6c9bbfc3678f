#include "cage.h"

#include "filter.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    PATHS_MAX = 32,
    CGROUPS_MAX = 4,
    SETTINGS_MAX = 16,
    // The first of a range of user numbers that systemd leaves to nobody (systemd: docs/UIDS-GIDS.md); the launcher's own number is added,
    // at most 2^22 (proc(5), pid_max), so no two cages of one machine have the same.
    FIRST_USER = 0x70000000,
    NAMESPACE_USER = 1000, // in a user namespace, where nothing but this one number exists
};

static const char *const names[LAYERS] = {
    [LAYER_USER] = "user", [LAYER_CAPABILITIES] = "capabilities", [LAYER_PRIVILEGES] = "no-new-privileges", [LAYER_PIDS] = "pids",
    [LAYER_NETWORK] = "network", [LAYER_IPC] = "ipc", [LAYER_UTS] = "uts", [LAYER_ROOT] = "root", [LAYER_LIMITS] = "limits",
    [LAYER_CGROUP] = "cgroup", [LAYER_LANDLOCK] = "landlock", [LAYER_CALLS] = "system-calls",
};

struct path {
    const char *name;
    bool writable; // a device
};

static struct {
    bool wanted;
    struct path paths[PATHS_MAX];
    int path_count;
    const char *cgroups[CGROUPS_MAX];
    int cgroup_count;
    struct {
        int cgroup;
        const char *setting; // FILE=VALUE
    } settings[SETTINGS_MAX];
    int setting_count;
    rlim_t processes, address_space;
} options = {.processes = RLIM_INFINITY, .address_space = RLIM_INFINITY};

static struct {
    pid_t pid;
    uid_t user;
    gid_t group;
} launcher; // as it is outside

// Shared with the child, which has nobody to tell once it is the VMM.
static struct {
    bool in_user_namespace;
    bool in_pid_namespace;
    struct {
        bool on;
        int error;
        const char *step; // a literal or an argument, at the same address in both
    } layers[LAYERS];
} *shared;

static bool on(enum layer layer)
{
    shared->layers[layer].on = true;
    return true;
}

static bool off(enum layer layer, const char *step, int error)
{
    shared->layers[layer].on = false;
    shared->layers[layer].error = error;
    shared->layers[layer].step = step;
    return false;
}

static size_t describe(enum layer layer, char *text, size_t size)
{
    return (size_t)(shared->layers[layer].on
        ? snprintf(text, size, " +%s", names[layer])
        : snprintf(text, size, " -%s:%s:%s", names[layer], shared->layers[layer].step, strerrorname_np(shared->layers[layer].error)));
}

// ---- options ------------------------------------------------------------------------------------------------------

static bool add_path(const char *name, bool writable)
{
    if (options.path_count == PATHS_MAX || name[0] != '/' || strlen(name) >= PATH_MAX / 2)
        return false;
    options.paths[options.path_count++] = (struct path){name, writable};
    return true;
}

bool cage_option(const char *name, char *value)
{
    if (strcmp(name, "--cage-read") == 0) {
        options.wanted = true;
        return add_path(value, false);
    }
    if (strcmp(name, "--cage-device") == 0)
        return add_path(value, true);
    if (strcmp(name, "--cage-cgroup") == 0 && options.cgroup_count < CGROUPS_MAX) {
        options.cgroups[options.cgroup_count++] = value;
        return true;
    }
    if (strcmp(name, "--cage-cgroup-set") == 0 && options.cgroup_count > 0 && options.setting_count < SETTINGS_MAX && strchr(value, '=')) {
        options.settings[options.setting_count].cgroup = options.cgroup_count - 1;
        options.settings[options.setting_count++].setting = value;
        return true;
    }
    char *end;
    errno = 0;
    rlim_t number = strtoull(value, &end, 10);
    if (*value < '0' || *value > '9' || *end != '\0' || errno != 0)
        return false;
    if (strcmp(name, "--cage-processes") == 0)
        options.processes = number;
    else if (strcmp(name, "--cage-address-space") == 0)
        options.address_space = number;
    else
        return false;
    return true;
}

// ---- cgroups ------------------------------------------------------------------------------------------------------

static bool write_file(const char *directory, const char *name, const char *value)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    bool written = write(file, value, strlen(value)) == (ssize_t)strlen(value);
    int error = errno;
    close(file);
    errno = error;
    return written;
}

static bool set_up_cgroup(int number)
{
    if (mkdir(options.cgroups[number], 0755) != 0 && errno != EEXIST)
        return off(LAYER_CGROUP, "mkdir", errno);
    for (int i = 0; i < options.setting_count; i++) {
        if (options.settings[i].cgroup != number)
            continue;
        char name[64];
        const char *setting = options.settings[i].setting, *equals = strchr(setting, '=');
        snprintf(name, sizeof name, "%.*s", (int)(equals - setting), setting);
        if (!write_file(options.cgroups[number], name, equals + 1))
            return off(LAYER_CGROUP, setting, errno);
    }
    return true;
}

void cage_join(pid_t pid, char *text, size_t size)
{
    *text = '\0';
    if (options.cgroup_count == 0)
        return;
    char process[16];
    snprintf(process, sizeof process, "%d", pid);
    bool joined = true;
    for (int i = 0; i < options.cgroup_count && joined; i++)
        joined = set_up_cgroup(i) && (write_file(options.cgroups[i], "cgroup.procs", process) || off(LAYER_CGROUP, "cgroup.procs", errno));
    if (joined)
        on(LAYER_CGROUP);
    describe(LAYER_CGROUP, text, size);
}

bool cage_remove(void (*failed)(const char *step, int error, const char *object))
{
    bool removed = true;
    for (int i = 0; i < options.cgroup_count; i++) {
        write_file(options.cgroups[i], "cgroup.kill", "1"); // version 2; what else was in the cage died with its first process
        if (rmdir(options.cgroups[i]) != 0 && errno != ENOENT) {
            failed("rmdir", errno, options.cgroups[i]);
            removed = false;
        }
    }
    return removed;
}

// ---- namespaces ---------------------------------------------------------------------------------------------------

static pid_t fork_with(uint64_t flags)
{
    struct clone_args arguments = {.flags = flags, .exit_signal = SIGCHLD};
    shared->in_user_namespace = flags & CLONE_NEWUSER;
    shared->in_pid_namespace = flags & CLONE_NEWPID;
    return (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
}

pid_t cage_fork(void)
{
    if (!options.wanted)
        return fork();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return -1;
    launcher.pid = getpid();
    launcher.user = geteuid();
    launcher.group = getegid();
    pid_t pid = launcher.user == 0 ? fork_with(CLONE_NEWPID) : -1;
    if (pid < 0)
        pid = fork_with(CLONE_NEWUSER | CLONE_NEWPID);
    if (pid < 0) {
        off(LAYER_USER, "clone", errno);
        off(LAYER_PIDS, "clone", errno);
        shared->in_user_namespace = shared->in_pid_namespace = false;
        pid = fork(); // not every container knows clone3
    }
    return pid;
}

// One number inside for the one outside; the kernel takes nothing else from an ordinary user (user_namespaces(7)).
static void map_user(void)
{
    char users[64], groups[64];
    snprintf(users, sizeof users, "%d %u 1", NAMESPACE_USER, launcher.user);
    snprintf(groups, sizeof groups, "%d %u 1", NAMESPACE_USER, launcher.group);
    if (write_file("/proc/self", "setgroups", "deny") && write_file("/proc/self", "uid_map", users) && write_file("/proc/self", "gid_map", groups))
        on(LAYER_USER);
    else
        off(LAYER_USER, "uid_map", errno);
}

static void leave_namespace(enum layer layer, int flag)
{
    if (unshare(flag) == 0)
        on(layer);
    else
        off(layer, "unshare", errno);
}

static void leave_namespaces(void)
{
    leave_namespace(LAYER_NETWORK, CLONE_NEWNET);
    leave_namespace(LAYER_IPC, CLONE_NEWIPC);
    leave_namespace(LAYER_UTS, CLONE_NEWUTS);
    if (shared->layers[LAYER_UTS].on && sethostname("vmm", 3) != 0)
        off(LAYER_UTS, "sethostname", errno);
    if (shared->in_pid_namespace)
        on(LAYER_PIDS);
}

// ---- root ---------------------------------------------------------------------------------------------------------

static bool make_directories(char *path)
{
    for (char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        bool made = mkdir(path, 0755) == 0 || errno == EEXIST;
        *slash = '/';
        if (!made)
            return false;
    }
    return true;
}

// A file that only its owner may read, or execute: another user would not get the VMM started.
static bool is_private(const struct stat *status)
{
    mode_t needed = S_IROTH | (status->st_mode & S_IXUSR ? S_IXOTH : 0);
    return !S_ISDIR(status->st_mode) && (status->st_mode & needed) != needed;
}

static bool has_private_file;

// Shows one file or tree of the host at the same place below the working directory. What the host does not have is left out.
static bool show(const struct path *path)
{
    char place[PATH_MAX], target[PATH_MAX];
    struct stat status;
    snprintf(place, sizeof place, "%s", path->name + 1);
    if (lstat(path->name, &status) != 0)
        return errno == ENOENT;
    if (!make_directories(place))
        return false;
    // /lib and its like, where they are links into /usr.
    ssize_t length = S_ISLNK(status.st_mode) && !strchr(place, '/') ? readlink(path->name, target, sizeof target - 1) : -1;
    if (length > 0) {
        target[length] = '\0';
        return symlink(target, place) == 0;
    }
    if (stat(path->name, &status) != 0)
        return errno == ENOENT;
    // As root a device is made anew, for the cage's user: the host's own may be root's alone. In a user namespace there are no new devices.
    if (path->writable && !shared->in_user_namespace)
        return mknod(place, S_IFCHR, status.st_rdev) == 0 && chmod(place, 0666) == 0;
    has_private_file |= is_private(&status);
    int file = S_ISDIR(status.st_mode) ? -1 : open(place, O_CREAT | O_RDONLY | O_CLOEXEC, 0644);
    if (file >= 0)
        close(file);
    else if (!S_ISDIR(status.st_mode) || (mkdir(place, 0755) != 0 && errno != EEXIST))
        return false;
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_NOSUID | (path->writable ? 0 : MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV)};
    return mount(path->name, place, NULL, MS_BIND | MS_REC, NULL) == 0 &&
           mount_setattr(AT_FDCWD, place, AT_RECURSIVE, &attributes, sizeof attributes) == 0;
}

static bool has_device(void)
{
    for (int i = 0; i < options.path_count; i++)
        if (options.paths[i].writable)
            return true;
    return false;
}

static bool change_root(void)
{
    if (unshare(CLONE_NEWNS) != 0)
        return off(LAYER_ROOT, "unshare", errno);
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return off(LAYER_ROOT, "mount", errno);
    // Over the run directory, so that it is not to be seen: the launcher and dh trust what is in it.
    char *place = getcwd(NULL, 0);
    unsigned long flags = MS_NOSUID | (has_device() ? 0 : MS_NODEV);
    if (!place || mount("vmm", place, "tmpfs", flags, "mode=755,size=1m") != 0 || chdir(place) != 0)
        return off(LAYER_ROOT, "tmpfs", errno);
    mode_t mask = umask(022); // another user must pass these directories
    for (int i = 0; i < options.path_count; i++)
        if (!show(&options.paths[i]))
            return off(LAYER_ROOT, "bind", errno);
    umask(mask);
    struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID};
    if (mount_setattr(AT_FDCWD, ".", 0, &read_only, sizeof read_only) != 0)
        return off(LAYER_ROOT, "mount_setattr", errno);
    // The old root is stacked on the new one, and taken away (pivot_root(2)).
    if (syscall(SYS_pivot_root, ".", ".") != 0 || umount2(".", MNT_DETACH) != 0 || chdir("/") != 0)
        return off(LAYER_ROOT, "pivot_root", errno);
    return on(LAYER_ROOT);
}

// ---- user and limits ----------------------------------------------------------------------------------------------

static void change_user(void)
{
    uid_t user = FIRST_USER + (uid_t)launcher.pid;
    if (shared->in_user_namespace || launcher.user != 0)
        return;
    // Without a root of its own the files could not be reached: the directories above them may be this user's alone.
    if (!shared->layers[LAYER_ROOT].on)
        off(LAYER_USER, "root", shared->layers[LAYER_ROOT].error);
    else if (has_private_file)
        off(LAYER_USER, "permissions", EACCES);
    else if (setgroups(0, NULL) != 0 || setresgid(user, user, user) != 0 || setresuid(user, user, user) != 0)
        off(LAYER_USER, "setresuid", errno);
    else
        on(LAYER_USER);
}

static void drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {0};
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) == 0 && syscall(SYS_capset, &header, none) == 0)
        on(LAYER_CAPABILITIES);
    else
        off(LAYER_CAPABILITIES, "capset", errno);
}

// Fails where the bounding set may not be changed; then no_new_privs and the empty sets must do.
static void drop_bounding_set(void)
{
    for (int capability = 0; capability <= CAP_LAST_CAP; capability++)
        prctl(PR_CAPBSET_DROP, capability, 0, 0, 0);
}

static void set_limits(void)
{
    on(LAYER_LIMITS);
    // Processes are counted by user: with a user of many processes the limit would hit others.
    if (shared->layers[LAYER_USER].on && options.processes != RLIM_INFINITY &&
        setrlimit(RLIMIT_NPROC, &(struct rlimit){options.processes, options.processes}) != 0)
        off(LAYER_LIMITS, "RLIMIT_NPROC", errno);
    if (options.address_space != RLIM_INFINITY &&
        setrlimit(RLIMIT_AS, &(struct rlimit){options.address_space, options.address_space}) != 0)
        off(LAYER_LIMITS, "RLIMIT_AS", errno);
}

// ---- Landlock -----------------------------------------------------------------------------------------------------

enum {
    READ = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR,
    OF_FILES = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE,
};

// linux/landlock.h of newer kernels than the headers that this may be built with.
struct rules {
    uint64_t files, network, scopes;
};

static struct rules known_to(int version)
{
    return (struct rules){
        .files = (1ull << (version < 2 ? 13 : version < 3 ? 14 : version < 5 ? 15 : 16)) - 1,
        .network = version < 4 ? 0 : 3, // bind and connect by TCP
        .scopes = version < 6 ? 0 : 3,  // abstract unix sockets, signals
    };
}

static bool grant(int ruleset, const struct path *path, uint64_t handled)
{
    int file = open(path->name, O_PATH | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0)
        return file < 0 && errno == ENOENT;
    uint64_t access = path->writable ? LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE | 1ull << 15 : READ;
    struct landlock_path_beneath_attr rule = {
        .allowed_access = access & handled & (S_ISDIR(status.st_mode) ? ~0ull : OF_FILES | 1ull << 15),
        .parent_fd = file,
    };
    bool granted = syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) == 0;
    close(file);
    return granted;
}

static bool restrict_paths(void)
{
    int version = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
    if (version < 0)
        return off(LAYER_LANDLOCK, "landlock_create_ruleset", errno);
    struct rules rules = known_to(version);
    size_t size = version < 4 ? sizeof rules.files : version < 6 ? 2 * sizeof rules.files : sizeof rules;
    int ruleset = (int)syscall(SYS_landlock_create_ruleset, &rules, size, 0);
    if (ruleset < 0)
        return off(LAYER_LANDLOCK, "landlock_create_ruleset", errno);
    for (int i = 0; i < options.path_count; i++)
        if (!grant(ruleset, &options.paths[i], rules.files))
            return off(LAYER_LANDLOCK, "landlock_add_rule", errno);
    if (syscall(SYS_landlock_restrict_self, ruleset, 0) != 0)
        return off(LAYER_LANDLOCK, "landlock_restrict_self", errno);
    close(ruleset);
    return on(LAYER_LANDLOCK);
}

// ---- all together -------------------------------------------------------------------------------------------------

void cage_enter(void)
{
    if (!options.wanted)
        return;
    if (shared->in_user_namespace)
        map_user();
    leave_namespaces();
    change_root();
    drop_bounding_set();
    change_user();
    drop_capabilities();
    set_limits();
}

void cage_lock(void)
{
    if (!options.wanted)
        return;
    on(LAYER_PRIVILEGES); // the launcher has set it, for whatever VMM
    restrict_paths();
    struct filter filter;
    build_start_filter(&filter);
    struct sock_fprog program = {.len = filter.length, .filter = filter.code};
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0)
        on(LAYER_CALLS);
    else
        off(LAYER_CALLS, "seccomp", errno);
}

void cage_report(char *text, size_t size)
{
    *text = '\0';
    if (!options.wanted)
        return;
    if (options.cgroup_count == 0)
        off(LAYER_CGROUP, "controllers", ENOENT);
    for (size_t layer = 0, length = 0; layer < LAYERS && length < size; layer++)
        if (layer != LAYER_CGROUP || options.cgroup_count == 0)
            length += describe(layer, text + length, size - length);
}
