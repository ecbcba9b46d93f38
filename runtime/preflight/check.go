// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// Member is what the shim of one container tells of it.
type Member struct {
	ID      string
	InitPid int
	// Pids are the processes of the container, init and its descendants, as the
	// host sees them. Empty stands for init alone.
	Pids []int
	// Foreign are processes of the container's cgroup that do not descend from
	// its init: exec sessions.
	Foreign []int
	// Status is the OCI runtime status: created, running, paused, stopped.
	Status       string
	NetnsInode   uint64
	HostNetwork  bool
	MemoryBytes  uint64
	StorageBytes uint64
	// CriuVersion is major*10000 + minor*100 + sublevel, 0 if CRIU cannot be run;
	// CriuError says why.
	CriuVersion int
	CriuError   string
	// MemoryError is why the memory engine that was asked for cannot be used (package
	// engine); empty if it can.
	MemoryError string
	// StorageAddress is the socket of the storage service in its root directory;
	// empty if the rootfs is not on the cohort snapshotter.
	StorageAddress string
}

// Options are what the checkpoint will be taken with. The zero value is what
// cohort's own CRIU driver uses.
type Options struct {
	// MinCriu is the oldest CRIU that will do; 0 means DefaultMinCriu.
	MinCriu int
	// GhostLimit is the largest unlinked file in bytes that CRIU is told to
	// carry; 0 means DefaultGhostLimit.
	GhostLimit uint64
	// CaptureDir is where captures are written; empty means the directory of each
	// member's StorageAddress.
	CaptureDir string
}

// Defaults of Options.
const (
	// Older ones fail on the vDSO of current kernels and on every TCP socket of
	// kernels from 6.16 on, which refuse SO_PASSCRED there.
	DefaultMinCriu = 40200
	// What runtime/criu sets; CRIU's own default is 1 MiB (criu/include/cr_options.h).
	DefaultGhostLimit = 512 << 20
)

// checker carries one Check.
type checker struct {
	opts    Options
	members []*member
	report  Report
	// owner finds the member of a process.
	owner map[int]*member
	// own are the namespaces of the caller, which CRIU will share.
	own map[string]uint64
	// mounts are the mount ids of each mount namespace by its inode.
	mounts map[uint64]map[uint64]bool
	// unix are the descriptors of unix sockets by inode.
	unix map[uint32]holder
	// inet are the descriptors of TCP sockets by inode.
	inet map[uint32]holder
	// ghosts are unlinked files seen already.
	ghosts map[[3]uint64]bool
}

type member struct {
	Member
	procs []*process
}

// holder is the first process found to hold a socket.
type holder struct {
	m  *member
	p  *process
	fd int
}

// Check looks at the members of one group, about a millisecond per process. It
// must see their processes in its own /proc and have the rights of root over them.
// An error means that it could not look; what it found is in the report, refusals
// first.
func Check(ctx context.Context, members []Member, opts Options) (Report, error) {
	start := time.Now()
	if opts.MinCriu == 0 {
		opts.MinCriu = DefaultMinCriu
	}
	if opts.GhostLimit == 0 {
		opts.GhostLimit = DefaultGhostLimit
	}
	c := &checker{
		opts: opts, owner: make(map[int]*member), mounts: make(map[uint64]map[uint64]bool),
		unix: make(map[uint32]holder), inet: make(map[uint32]holder), ghosts: make(map[[3]uint64]bool),
	}
	c.report.Findings = []Finding{}
	var err error
	if c.own, err = namespaces("self"); err != nil {
		return c.report, fmt.Errorf("preflight: reading the caller's namespaces: %w", err)
	}
	for i := range members {
		m := &member{Member: members[i]}
		if !c.running(m) {
			continue
		}
		c.members = append(c.members, m)
		if len(m.Pids) == 0 {
			m.Pids = []int{m.InitPid}
		}
		for _, pid := range m.Pids {
			c.owner[pid] = m
		}
	}
	for _, m := range c.members {
		c.criu(m)
		if m.MemoryError != "" {
			c.find(Refuse, CodeMemory, m, nil, "leave the choice to cohort, or take one that 'cohort check' names", "cannot have its memory taken as was asked for: %s", m.MemoryError)
		}
		if err := c.read(ctx, m); err != nil {
			return c.report, fmt.Errorf("preflight: %w", err)
		}
	}
	c.shared()
	for _, m := range c.members {
		c.foreign(m)
		for _, p := range m.procs {
			if err := ctx.Err(); err != nil {
				return c.report, fmt.Errorf("preflight: %w", err)
			}
			c.process(m, p)
			c.files(m, p)
			c.mappings(m, p)
		}
	}
	if err := c.sockets(); err != nil {
		return c.report, fmt.Errorf("preflight: %w", err)
	}
	c.disk()
	c.waits()
	slices.SortStableFunc(c.report.Findings, func(a, b Finding) int { return cmp.Compare(a.Severity, b.Severity) })
	c.report.Took = time.Since(start)
	return c.report, nil
}

// find records a finding of a member, of one of its processes where p is not nil.
func (c *checker) find(s Severity, code string, m *member, p *process, cure, what string, args ...any) {
	f := Finding{Severity: s, Code: code, What: fmt.Sprintf(what, args...), Cure: cure}
	if m != nil {
		f.Member = m.ID
	}
	if p != nil {
		f.Pid, f.Process = p.pid, p.comm
	}
	c.report.Findings = append(c.report.Findings, f)
}

// running refuses a member that cannot be frozen now.
func (c *checker) running(m *member) bool {
	switch {
	case m.Status == "paused" || m.Status == "pausing":
		c.find(Refuse, CodeStatus, m, nil, "resume it first", "is %s", m.Status)
	case m.Status == "created":
		c.find(Refuse, CodeStatus, m, nil, "start it first, or leave it out of the group", "was created and not started")
	case m.Status == "stopped" || m.InitPid <= 0:
		c.find(Refuse, CodeGone, m, nil, "start it, or leave it out of the group", "has no running process")
	default:
		return true
	}
	return false
}

func (c *checker) criu(m *member) {
	const cure = "install CRIU 4.2 or newer where the shim of the member finds it"
	switch {
	case m.CriuVersion == 0 && m.CriuError == "":
		c.find(Refuse, CodeCRIU, m, nil, cure, "has no CRIU")
	case m.CriuVersion == 0:
		c.find(Refuse, CodeCRIU, m, nil, cure, "has no usable CRIU (%s)", m.CriuError)
	case m.CriuVersion < c.opts.MinCriu:
		c.find(Refuse, CodeCRIU, m, nil, cure, "has CRIU %s, older than %s", version(m.CriuVersion), version(c.opts.MinCriu))
	}
}

func version(v int) string { return fmt.Sprintf("%d.%d.%d", v/10000, v/100%100, v%100) }
