// SPDX-License-Identifier: Apache-2.0

// Package journal keeps on disk what cohort has done, or is about to do, to a
// container, so that whoever survives can find the container and undo it.
//
// There are three kinds of records, one file each, below the state directory
// (COHORT_STATE, by default /run/cohort, mode 0700):
//
//	members/NAMESPACE/ID.json   a container with a live shim: how to reach it
//	epochs/NAMESPACE/ID.json    an epoch in progress: what must be undone
//	restores/NAMESPACE/ID.json  a group's restore in progress: what must be removed
//
// A record is written before the act and removed after its undo. Files appear
// and change by rename, so a reader never sees half of one. The shim writes, and the
// command line its restores; the shim's delete action, cohortd's janitor and the
// command line read.
package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// DefaultDir is the state directory where COHORT_STATE is not set.
const DefaultDir = "/run/cohort"

// Dir is the state directory of this process.
func Dir() string {
	if d := os.Getenv("COHORT_STATE"); d != "" {
		return d
	}
	return DefaultDir
}

// Proc names a process for good: a pid alone may be another's tomorrow.
type Proc struct {
	Pid int `json:"pid"`
	// Start is the start time in clock ticks since boot (proc(5), stat field 22).
	Start uint64 `json:"start"`
}

// Self is the calling process.
func Self() Proc {
	p, _ := ProcOf(os.Getpid())
	return p
}

// ProcOf identifies a running process.
func ProcOf(pid int) (Proc, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Proc{Pid: pid}, err
	}
	// The command name, in parentheses, may itself hold spaces and parentheses.
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return Proc{Pid: pid}, fmt.Errorf("parse /proc/%d/stat: %d fields", pid, len(fields))
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return Proc{Pid: pid}, os.ErrProcessDone
	}
	var start uint64
	if _, err := fmt.Sscan(fields[19], &start); err != nil {
		return Proc{Pid: pid}, fmt.Errorf("parse /proc/%d/stat: %w", pid, err)
	}
	return Proc{Pid: pid, Start: start}, nil
}

// Alive tells whether the very process still runs.
func (p Proc) Alive() bool {
	q, err := ProcOf(p.Pid)
	return err == nil && q.Start == p.Start
}

// Member is the record of a container with a live shim.
type Member struct {
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	// Containerd is the gRPC address of the containerd that owns the shim.
	Containerd string `json:"containerd"`
	// Address is the shim's ttrpc address ("unix:///...").
	Address string `json:"address"`
	Shim    Proc   `json:"shim"`
	Bundle  string `json:"bundle"`
	// Netns is a network namespace that the shim made for a restored container
	// and that must go with it; empty if it made none.
	Netns string `json:"netns,omitempty"`
	// Group and Name are the annotations io.cohort.group and io.cohort.member.
	Group string `json:"group,omitempty"`
	Name  string `json:"name,omitempty"`
}

// Epoch is the record of an epoch in progress: all that must be known to undo
// it without the shim.
type Epoch struct {
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	Epoch     string `json:"epoch"`
	Shim      Proc   `json:"shim"`
	// State is the member's state machine, see runtime/group.
	State json.RawMessage `json:"state,omitempty"`
	// InitPid is the container's init process, whose cgroup is frozen.
	Init Proc `json:"init"`
	// Freezer is the cgroup directory that is, or is about to be, frozen.
	Freezer string `json:"freezer,omitempty"`
	// Netns and Table name the communication rules.
	Netns string `json:"netns,omitempty"`
	Table string `json:"table,omitempty"`
	// Criu is the CRIU process.
	Criu Proc `json:"criu"`
	// Storage and Capture name the capture at cohortd.
	Storage string `json:"storage,omitempty"`
	Capture string `json:"capture,omitempty"`
}

// Restore is the record of a group's restore in progress. Until a shim has taken a
// container into them, nobody but its command knows of the network namespaces.
type Restore struct {
	// ID is chosen by the command, at random.
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	// Command is the process that restores.
	Command Proc `json:"command"`
	// Netns are the paths of the network namespaces, Table the name of the rules that
	// keep them silent.
	Netns []string `json:"netns,omitempty"`
	Table string   `json:"table,omitempty"`
}

func path(dir, kind, ns, id string) string {
	return filepath.Join(dir, kind, ns, id+".json")
}

// Write stores a record: rec is a *Member, an *Epoch or a *Restore.
func Write(dir string, rec any) error {
	var p string
	switch r := rec.(type) {
	case *Member:
		p = path(dir, "members", r.Namespace, r.ID)
	case *Epoch:
		p = path(dir, "epochs", r.Namespace, r.ID)
	case *Restore:
		p = path(dir, "restores", r.Namespace, r.ID)
	default:
		return fmt.Errorf("no record of type %T", rec)
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	// The state directory does not survive a reboot, and neither does anything
	// that a record could undo: no fsync.
	tmp := p + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(tmp, p); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// RemoveMember and RemoveEpoch delete a record; it need not exist.
func RemoveMember(dir, ns, id string) error { return remove(path(dir, "members", ns, id)) }

// RemoveEpoch deletes the record of an epoch; it need not exist.
func RemoveEpoch(dir, ns, id string) error { return remove(path(dir, "epochs", ns, id)) }

// RemoveRestore deletes the record of a restore; it need not exist.
func RemoveRestore(dir, ns, id string) error { return remove(path(dir, "restores", ns, id)) }

func remove(p string) error {
	if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove record: %w", err)
	}
	return nil
}

// ReadMember reads one record; the error is os.ErrNotExist where there is none.
func ReadMember(dir, ns, id string) (*Member, error) {
	return read[Member](path(dir, "members", ns, id))
}

// ReadEpoch reads one record; the error is os.ErrNotExist where there is none.
func ReadEpoch(dir, ns, id string) (*Epoch, error) {
	return read[Epoch](path(dir, "epochs", ns, id))
}

// Members reads all member records; unreadable ones are left out.
func Members(dir string) ([]*Member, error) { return list[Member](filepath.Join(dir, "members")) }

// Epochs reads all epoch records; unreadable ones are left out.
func Epochs(dir string) ([]*Epoch, error) { return list[Epoch](filepath.Join(dir, "epochs")) }

// Restores reads all records of restores; unreadable ones are left out.
func Restores(dir string) ([]*Restore, error) { return list[Restore](filepath.Join(dir, "restores")) }

func read[T any](p string) (*T, error) {
	b, err := os.ReadFile(p)
	if err != nil {
		return nil, err
	}
	rec := new(T)
	if err := json.Unmarshal(b, rec); err != nil {
		return nil, fmt.Errorf("decode record %s: %w", p, err)
	}
	return rec, nil
}

func list[T any](dir string) ([]*T, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", "*.json"))
	if err != nil {
		return nil, err
	}
	var out []*T
	for _, f := range files {
		if rec, err := read[T](f); err == nil {
			out = append(out, rec)
		}
	}
	return out, nil
}
