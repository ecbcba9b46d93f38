// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Severity tells whether a finding stands in the way.
type Severity string

// Severities of findings.
const (
	// Refuse: the checkpoint would fail, or could not be restored.
	Refuse Severity = "refuse"
	// Warn: it can be taken, and something will be missing or different.
	Warn Severity = "warn"
)

// Codes of findings, for programs.
const (
	CodeCRIU        = "criu"
	CodeDisk        = "disk"
	CodeMemory      = "memory"
	CodeStatus      = "status"
	CodeGone        = "gone"
	CodeHostNetwork = "host-network"
	CodeNamespace   = "namespace"
	CodeForeign     = "foreign"
	CodeTraced      = "traced"
	CodeState       = "state"
	CodeSession     = "session"
	CodeIOUring     = "io-uring"
	CodeAnonInode   = "anon-inode"
	CodeWatch       = "watch"
	CodePidfd       = "pidfd"
	CodeDevice      = "device"
	CodeOutsideFile = "outside-file"
	CodeStdio       = "stdio"
	CodeGhost       = "ghost-file"
	CodeMapping     = "mapping"
	CodeUnix        = "unix-socket"
	CodeSocket      = "socket"
	CodePending     = "pending-connection"
)

// Finding is one thing that was found.
type Finding struct {
	Severity Severity `json:"severity"`
	Code     string   `json:"code"`
	// Member is the id of the member, empty for what concerns the whole group.
	Member string `json:"member,omitempty"`
	// Pid is the process as the host sees it and Process its name; 0 and empty for
	// what concerns the whole member.
	Pid     int    `json:"pid,omitempty"`
	Process string `json:"process,omitempty"`
	// What is a clause with the process, or the member, as its subject: "uses
	// io_uring". Without a member it has a subject of its own.
	What string `json:"what"`
	// Cure is an instruction.
	Cure string `json:"cure"`
}

// String puts the finding into one sentence.
func (f Finding) String() string {
	var b strings.Builder
	switch {
	case f.Member != "" && f.Pid != 0:
		fmt.Fprintf(&b, "member %s: process %d (%s) ", f.Member, f.Pid, f.Process)
	case f.Member != "":
		fmt.Fprintf(&b, "member %s ", f.Member)
	}
	b.WriteString(f.What)
	if f.Cure != "" {
		b.WriteString("; " + f.Cure)
	}
	return b.String()
}

// Report is the outcome of a Check.
type Report struct {
	Findings []Finding `json:"findings"`
	// GhostBytes is the size of the largest unlinked file that a process holds
	// open, what CRIU's ghost limit must allow.
	GhostBytes uint64 `json:"ghost_bytes,omitempty"`
	// NeededBytes estimates what the checkpoint writes to disk.
	NeededBytes uint64 `json:"needed_bytes,omitempty"`
	// Processes is how many were looked at, Took how long it took.
	Processes int           `json:"processes"`
	Took      time.Duration `json:"took_ns"`
}

// Refused tells whether something stands in the way.
func (r Report) Refused() bool {
	for _, f := range r.Findings {
		if f.Severity == Refuse {
			return true
		}
	}
	return false
}

// Err joins the refusals into one error of class errdefs.ErrFailedPrecondition,
// nil when there are none.
func (r Report) Err() error {
	var errs []error
	for _, f := range r.Findings {
		if f.Severity == Refuse {
			errs = append(errs, errors.New(f.String()))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("preflight: %w: %w", errors.Join(errs...), errdefs.ErrFailedPrecondition)
}
