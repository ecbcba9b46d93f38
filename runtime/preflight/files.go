// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// files looks at every open file of a process. The rules are those of
// criu/files.c, dump_one_file; threads with a file table of their own, which CRIU
// does not know either, are not looked at.
func (c *checker) files(m *member, p *process) {
	if p.state == 'Z' {
		return
	}
	names, err := readNames(p.path("fd"))
	if err != nil {
		return // it has ended
	}
	// Several descriptors of one kind are one finding.
	seen := make(map[string]bool)
	once := func(key string) bool {
		if seen[key] {
			return false
		}
		seen[key] = true
		return true
	}
	for _, name := range names {
		path := p.path("fd", name)
		link, err := os.Readlink(path)
		if err != nil {
			continue // closed since
		}
		fd, _ := strconv.Atoi(name)
		switch {
		case strings.HasPrefix(link, "socket:["):
			ino, _ := strconv.ParseUint(strings.TrimSuffix(link[len("socket:["):], "]"), 10, 64)
			c.socket(m, p, fd, path, uint32(ino), once)
		case strings.HasPrefix(link, "anon_inode:"):
			c.anonymous(m, p, fd, strings.Trim(link[len("anon_inode:"):], "[]"), once)
		case strings.HasPrefix(link, "pidfd:"):
			c.anonymous(m, p, fd, "pidfd", once)
		case strings.HasPrefix(link, "/"):
			c.named(m, p, fd, path, link, once)
		}
		// What is left are pipes and namespace files, which CRIU knows.
	}
}

// readNames lists a directory without the sorting and the lstat of os.ReadDir.
func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// anonymous judges a file of the kernel's anonymous inode file system by the name
// that the kernel gives it.
func (c *checker) anonymous(m *member, p *process, fd int, kind string, once func(string) bool) {
	if kind != "pidfd" && !once("anon:"+kind) {
		return
	}
	switch kind {
	case "eventfd", "eventpoll", "signalfd", "timerfd":
	case "inotify", "fanotify":
		// criu/fsnotify.c, check_open_handle: on overlay and tmpfs a watched path
		// must still be found by its handle.
		c.find(Warn, CodeWatch, m, p, "expect lost events, and a failure if a watched file was removed",
			"watches files with %s (descriptor %d)", kind, fd)
	case "pidfd":
		pid := pidfdTarget(p, fd)
		if pid > 0 && c.owner[pid] != m && once("pidfd:"+strconv.Itoa(pid)) {
			// criu/pidfd.c, dump_one_pidfd.
			c.find(Refuse, CodePidfd, m, p, "close it, or move that process into the container",
				"holds a pidfd of process %d (%s), which is not part of the container (descriptor %d)", pid, commOf(pid), fd)
		}
	case "bpf-map":
		c.find(Warn, CodeAnonInode, m, p, "expect it to work only with a CRIU built with libbpf", "holds a BPF map (descriptor %d)", fd)
	case "io_uring":
		c.find(Refuse, CodeIOUring, m, p, "switch io_uring off in its configuration, or deny it with a seccomp profile",
			"uses io_uring, which CRIU cannot save (descriptor %d)", fd)
	default:
		name, cure := "a kernel object of kind "+kind, "have it close that before the checkpoint"
		switch {
		case kind == "perf_event":
			name, cure = "a performance counter", "end the profiler in it"
		case kind == "userfaultfd":
			name, cure = "a userfaultfd", "end what handles its page faults"
		case strings.HasPrefix(kind, "kvm"):
			name, cure = "a virtual machine ("+kind+")", "stop the virtual machine"
		case strings.HasPrefix(kind, "bpf"):
			name = "a BPF object (" + kind + ")"
		case strings.HasPrefix(kind, "seccomp"):
			name, cure = "a seccomp listener", "run the container without a seccomp supervisor in it"
		}
		c.find(Refuse, CodeAnonInode, m, p, cure, "holds %s, which CRIU cannot save (descriptor %d)", name, fd)
	}
}

// pidfdTarget reads whom a pidfd stands for, as this /proc numbers it; -1 for one
// that has ended.
func pidfdTarget(p *process, fd int) int {
	data, err := os.ReadFile(p.path("fdinfo", strconv.Itoa(fd)))
	if err != nil {
		return -1
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, _ := strconv.Atoi(strings.TrimSpace(value))
			return pid
		}
	}
	return -1
}

// statx looks at an open file without asking a network or FUSE server, which
// might not answer.
func statx(path string) (unix.Statx_t, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT,
		unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st)
	return st, err
}

// named judges an open file that has a path.
func (c *checker) named(m *member, p *process, fd int, path, link string, once func(string) bool) {
	switch {
	case strings.HasPrefix(link, "/memfd:"):
		return
	case strings.HasPrefix(link, "/secretmem"):
		if once("secretmem") {
			c.find(Refuse, CodeAnonInode, m, p, "have it close that before the checkpoint",
				"holds secret memory, which nobody else may read (descriptor %d)", fd)
		}
		return
	case strings.HasPrefix(link, "/dmabuf:"):
		if once("dmabuf") {
			c.find(Refuse, CodeDevice, m, p, deviceCure, "holds a buffer shared with a device (descriptor %d)", fd)
		}
		return
	}
	st, err := statx(path)
	if err != nil {
		return
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		if !saveable(st) {
			if once("device:" + link) {
				c.find(Refuse, CodeDevice, m, p, deviceCure, "has the device %s open, whose state is outside the process (descriptor %d)", link, fd)
			}
			return
		}
	case unix.S_IFSOCK:
		return
	}
	if st.Mask&unix.STATX_MNT_ID != 0 && !c.mounted(m, p, st.Mnt_id) {
		// criu/files-reg.c, dump_one_reg_file: "Can't lookup mount".
		if fd <= 2 {
			if once("stdio:" + link) {
				what := "a file outside the container"
				if st.Mode&unix.S_IFMT == unix.S_IFCHR {
					what = "a device of the host's and not the container's own"
				}
				c.find(Refuse, CodeStdio, m, p, "create the container anew, with pipes, a terminal or null streams as its standard streams (one that a client has restored: let the client give it such as it had)",
					"has %s, %s, as its %s", link, what, []string{"standard input", "standard output", "standard error"}[fd])
			}
		} else if once("outside:" + link) {
			c.find(Refuse, CodeOutsideFile, m, p, "mount the file into the container, or have it closed before the container starts",
				"has %s open, a file outside the container (descriptor %d)", link, fd)
		}
		return
	}
	if st.Nlink == 0 && st.Mode&unix.S_IFMT == unix.S_IFREG {
		c.ghost(m, p, st, link)
	}
}

const deviceCure = "take the device out of the container, or have the process close it before the checkpoint"

// saveable tells whether CRIU knows the device: criu/files.c, dump_chrdev, and
// criu/tty.c, get_tty_driver.
func saveable(st unix.Statx_t) bool {
	if st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return false
	}
	const tun, autofs = 200, 235
	major, minor := st.Rdev_major, st.Rdev_minor
	switch {
	case major == 1: // null, zero, full, random, urandom, kmsg
		return true
	case major == 10:
		return minor == tun || minor == autofs
	case major == 4:
		return minor >= 1 && minor <= 63
	case major == 5:
		return minor <= 2
	}
	// pseudo terminals and two kinds of serial lines
	return (major >= 128 && major <= 135) || major == 136 || major == 188 || major == 204
}

// mounted tells whether a mount id belongs to a mount namespace of the member.
func (c *checker) mounted(m *member, p *process, id uint64) bool {
	procs := []*process{p}
	if init := m.init(); init != nil && init.namespaces["mnt"] != p.namespaces["mnt"] {
		procs = append(procs, init)
	}
	for _, q := range procs {
		ns := q.namespaces["mnt"]
		ids, ok := c.mounts[ns]
		if !ok {
			ids = make(map[uint64]bool)
			data, err := os.ReadFile(q.path("mountinfo"))
			if err != nil {
				return true // it has ended; nothing can be said
			}
			for line := range strings.Lines(string(data)) {
				num, _, _ := strings.Cut(line, " ")
				n, _ := strconv.ParseUint(num, 10, 64)
				ids[n] = true
			}
			c.mounts[ns] = ids
		}
		if ids[id] {
			return true
		}
	}
	return false
}

// ghost judges an unlinked file: its content goes into the images, up to a limit
// (criu/files-reg.c, dump_ghost_remap).
func (c *checker) ghost(m *member, p *process, st unix.Statx_t, link string) {
	key := [3]uint64{uint64(st.Dev_major), uint64(st.Dev_minor), st.Ino}
	if c.ghosts[key] {
		return
	}
	c.ghosts[key] = true
	size := st.Blocks * 512
	c.report.GhostBytes = max(c.report.GhostBytes, size)
	if size > c.opts.GhostLimit {
		c.find(Refuse, CodeGhost, m, p, "restart the process, or raise the limit",
			"holds the removed file %s of %s open, more than the limit of %s", strings.TrimSuffix(link, " (deleted)"), bytes(size), bytes(c.opts.GhostLimit))
	}
}

// mappings looks for memory that is not memory. The rules are those of
// criu/proc_parse.c, handle_vma.
func (c *checker) mappings(m *member, p *process) {
	if p.state == 'Z' {
		return
	}
	data, err := os.ReadFile(p.path("maps"))
	if err != nil {
		return
	}
	seen := make(map[string]bool)
	for line := range strings.Lines(string(data)) {
		// address perms offset dev inode path; most lines are judged without
		// being split.
		i := strings.IndexByte(line, '/')
		if i < 0 {
			if i = strings.Index(line, "[uprobes]"); i < 0 {
				if i = strings.Index(line, "anon_inode:"); i < 0 {
					continue
				}
			}
		}
		path := strings.TrimSuffix(line[i:], "\n")
		if seen[path] {
			continue
		}
		seen[path] = true
		switch {
		case path == "[uprobes]":
			c.find(Refuse, CodeMapping, m, p, "end the tracing tool that placed it", "has a probe of the kernel in its code")
		case strings.HasPrefix(path, "anon_inode:"):
			kind := strings.Trim(path[len("anon_inode:"):], "[]")
			if c.reported(p, kind) {
				continue
			}
			if kind == "io_uring" {
				c.find(Refuse, CodeIOUring, m, p, "switch io_uring off in its configuration, or deny it with a seccomp profile",
					"has an io_uring mapped, which CRIU cannot save")
				continue
			}
			c.find(Refuse, CodeMapping, m, p, "have it unmap that before the checkpoint", "has a kernel object of kind %s mapped", kind)
		case strings.HasPrefix(path, "/SYSV"):
			// criu/cr-dump.c, check_sysvipc_map_dump.
			if p.namespaces["ipc"] == c.own["ipc"] {
				c.find(Refuse, CodeNamespace, m, p, "run the container in an ipc namespace of its own",
					"uses System V shared memory of the host")
			}
		case strings.HasPrefix(path, "/dev/") && !strings.HasPrefix(path, "/dev/zero") && !strings.HasPrefix(path, "/dev/shm/"):
			if st, err := statx(p.path("map_files", line[:strings.IndexByte(line, ' ')])); err == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR {
				c.find(Refuse, CodeDevice, m, p, deviceCure, "has the device %s mapped", path)
			}
		case strings.HasSuffix(path, " (deleted)") && !kernelFile(path):
			if st, err := statx(p.path("map_files", line[:strings.IndexByte(line, ' ')])); err == nil && st.Nlink == 0 {
				c.ghost(m, p, st, path)
			}
		}
	}
}

// kernelFile tells names of mappings that look like removed files and are none.
func kernelFile(path string) bool {
	for _, prefix := range []string{"/memfd:", "/dev/zero", "/SYSV", "/[aio]", "/anon_hugepage"} {
		if strings.HasPrefix(path, prefix) {
			return true
		}
	}
	return false
}

// reported tells whether the descriptors of the process gave the same away.
func (c *checker) reported(p *process, kind string) bool {
	code := CodeAnonInode
	if kind == "io_uring" {
		code = CodeIOUring
	}
	for _, f := range c.report.Findings {
		if f.Pid == p.pid && f.Code == code {
			return true
		}
	}
	return false
}

// bytes prints a size for people.
func bytes(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/unit, 0
	for ; v >= unit && i < 5; i++ {
		v /= unit
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTPE"[i])
}
