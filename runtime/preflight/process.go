// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is one process as /proc shows it.
type process struct {
	pid     int
	comm    string
	state   byte
	tracer  int
	threads int
	// nsPid and nsSid are the ids in the innermost pid namespace; a session of 0
	// is led from outside of it.
	nsPid, nsSid int
	// switches counts how often the main thread left the CPU.
	switches   uint64
	namespaces map[string]uint64
}

func (p *process) path(elem ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(p.pid)}, elem...)...)
}

// ended tells whether err means that the process went while it was read, which
// is nobody's fault.
func ended(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}

// settleTime is how long a process may take to get over a state that mostly lasts
// for milliseconds, and settlePause the time between two looks: nothing tells its end.
const (
	settleTime  = time.Second
	settlePause = 5 * time.Millisecond
)

// passing tells whether a process is in such a state: the other threads of one that
// exits end after its main thread, and the tracer may be another checkpoint's page tracking.
func (p *process) passing() bool {
	return p.tracer != 0 || (p.state == 'Z' && p.threads > 1)
}

// settled reads a process when it has got over what passes, or not in time.
func settled(ctx context.Context, pid int) (*process, error) {
	for begun := time.Now(); ; {
		p, err := readProcess(pid)
		if err != nil || !p.passing() || time.Since(begun) > settleTime {
			return p, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(settlePause):
		}
	}
}

// read takes in what concerns all processes of a member.
func (c *checker) read(ctx context.Context, m *member) error {
	for _, pid := range m.Pids {
		if err := ctx.Err(); err != nil {
			return err
		}
		p, err := settled(ctx, pid)
		if err == nil && p.state != 'Z' {
			p.namespaces, err = namespaces(strconv.Itoa(pid))
		}
		switch {
		case err != nil && !ended(err):
			return fmt.Errorf("reading process %d of member %s: %w", pid, m.ID, err)
		case pid == m.InitPid && (err != nil || p.state == 'Z'):
			c.find(Refuse, CodeGone, m, nil, "start it, or leave it out of the group", "has no running process: its init, %d, has ended", pid)
			m.procs = nil
			return nil //nolint:nilerr // it is a finding
		case err == nil:
			m.procs = append(m.procs, p)
			c.report.Processes++
		}
	}
	return nil
}

// init is the member's first process, nil where it was not found.
func (m *member) init() *process {
	for _, p := range m.procs {
		if p.pid == m.InitPid {
			return p
		}
	}
	return nil
}

// readProcess reads /proc/PID/status (proc_pid_status(5)).
func readProcess(pid int) (*process, error) {
	p := &process{pid: pid}
	data, err := os.ReadFile(p.path("status"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		fields := strings.Fields(value)
		if key == "Name" {
			p.comm = strings.TrimPrefix(value, "\t")
			continue
		}
		if len(fields) == 0 {
			continue
		}
		switch last := fields[len(fields)-1]; key {
		case "State":
			p.state = fields[0][0]
		case "TracerPid":
			p.tracer, _ = strconv.Atoi(last)
		case "Threads":
			p.threads, _ = strconv.Atoi(last)
		case "NSpid":
			p.nsPid, _ = strconv.Atoi(last)
		case "NSsid":
			p.nsSid, _ = strconv.Atoi(last)
		case "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches":
			n, _ := strconv.ParseUint(last, 10, 64)
			p.switches += n
		}
	}
	return p, nil
}

// namespaces reads the inodes of /proc/PID/ns.
func namespaces(pid string) (map[string]uint64, error) {
	ns := make(map[string]uint64, len(nsNames))
	for _, name := range nsNames {
		link, err := os.Readlink("/proc/" + pid + "/ns/" + name)
		if err != nil {
			// An older kernel has no time namespace; pid_for_children of a
			// namespace without an init cannot be read.
			if errors.Is(err, fs.ErrNotExist) && name != "net" {
				continue
			}
			return nil, err
		}
		_, num, _ := strings.Cut(link, ":[")
		ns[name], _ = strconv.ParseUint(strings.TrimSuffix(num, "]"), 10, 64)
	}
	return ns, nil
}

var nsNames = []string{"net", "pid", "ipc", "mnt", "uts", "user", "cgroup", "time", "time_for_children"}

// process checks what a process is, apart from what it holds.
func (c *checker) process(m *member, p *process) {
	// compel/src/lib/infect.c: a process has one tracer, and CRIU must be it.
	if p.tracer != 0 {
		c.find(Refuse, CodeTraced, m, p, "end the debugger or tracer", "is traced by process %d (%s)", p.tracer, commOf(p.tracer))
	}
	// criu/seize.c, collect_threads.
	if p.state == 'Z' && p.threads > 1 {
		c.find(Refuse, CodeState, m, p, "let it end, or restart the container", "has ended in its main thread while %d others run", p.threads-1)
	}
	if p.state == 'Z' {
		return
	}
	init := m.init()
	// criu/cr-dump.c, dump_one_task. In a nested pid namespace, refused below, it
	// says nothing.
	if p.nsSid == 0 && (init == nil || init.namespaces["pid"] == p.namespaces["pid"]) {
		c.find(Refuse, CodeSession, m, p, "start the container detached, its init in a session of its own",
			"belongs to a session that is led from outside the container")
	}
	if init == nil || init == p {
		return
	}
	// criu/namespaces.c, generate_ns_id: mount and network namespaces may be
	// nested, a namespace that CRIU itself is in may be used, others may not.
	for _, name := range []string{"pid", "ipc", "uts", "user", "cgroup", "time"} {
		if ns := p.namespaces[name]; ns != 0 && ns != init.namespaces[name] && ns != c.own[name] {
			c.find(Refuse, CodeNamespace, m, p, "run it as a container of its own, or without a namespace of its own",
				"is in a %s namespace of its own inside the container", name)
		}
	}
	if net := p.namespaces["net"]; net != init.namespaces["net"] {
		c.find(Warn, CodeNamespace, m, p, "expect its network to be absent after a restore",
			"is in a network namespace of its own inside the container")
	}
}

// shared checks the namespaces of the members' inits against each other and the
// host's.
func (c *checker) shared() {
	type use struct {
		m *member
		p *process
	}
	first := make(map[string]use)
	for _, m := range c.members {
		p := m.init()
		if p == nil {
			continue
		}
		if tfc := p.namespaces["time_for_children"]; tfc != p.namespaces["time"] {
			c.find(Refuse, CodeNamespace, m, p, "run the container without a time namespace of its own", "gives its children another time namespace")
		}
		switch pidns := p.namespaces["pid"]; {
		case pidns == c.own["pid"]:
			c.find(Refuse, CodeNamespace, m, nil, "run the container in a pid namespace of its own",
				"shares the host's pid namespace, so its pids could not be had again")
			continue
		case p.nsPid != 1:
			// criu/namespaces.c: "Can't dump a pid namespace without the process init".
			other := "a pid namespace whose init is not its own"
			for _, o := range c.members {
				if i := o.init(); o != m && i != nil && i.namespaces["pid"] == pidns {
					other = "the pid namespace of member " + o.ID
				}
			}
			c.find(Refuse, CodeNamespace, m, nil, "run the container in a pid namespace of its own", "shares %s", other)
			continue
		}
		for _, name := range []string{"ipc", "mnt"} {
			ns := p.namespaces[name]
			if ns == c.own[name] {
				continue
			}
			key := name + strconv.FormatUint(ns, 10)
			if o, ok := first[key]; ok {
				c.find(Refuse, CodeNamespace, m, nil, "run the containers in "+name+" namespaces of their own",
					"shares the %s namespace of member %s, which would be saved twice and restored as two", name, o.m.ID)
				continue
			}
			first[key] = use{m, p}
		}
	}
}

// foreign warns of exec sessions, which are not part of the process tree that
// CRIU dumps from init down.
func (c *checker) foreign(m *member) {
	for _, pid := range m.Foreign {
		p, err := readProcess(pid)
		if err != nil || p.state == 'Z' {
			continue
		}
		c.find(Warn, CodeForeign, m, p, "expect it to be absent after a restore",
			"was started by exec into the container and is left out")
	}
}

// waits looks once more at the processes that were in an uninterruptible wait:
// one that has not left it since keeps the freeze waiting.
func (c *checker) waits() {
	for _, m := range c.members {
		for _, p := range m.procs {
			if p.state != 'D' {
				continue
			}
			if now, err := readProcess(p.pid); err == nil && now.state == 'D' && now.switches == p.switches {
				c.find(Warn, CodeState, m, p, "look at the storage it waits for, or expect a longer stop",
					"is in an uninterruptible wait (%s), which a freeze must wait out", wchan(p))
			}
		}
	}
}

func wchan(p *process) string {
	data, err := os.ReadFile(p.path("wchan"))
	if err != nil || len(data) == 0 || string(data) == "0" {
		return "unknown"
	}
	return string(data)
}

func commOf(pid int) string {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil {
		return "?"
	}
	return strings.TrimSuffix(string(data), "\n")
}
