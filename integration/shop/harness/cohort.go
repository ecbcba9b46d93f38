// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
)

// Cohort is the cohort command. It may be used concurrently.
type Cohort struct {
	// Bin is the program, "cohort" of the PATH if empty.
	Bin string
	// Address and Namespace as of its options; empty leaves them to it.
	Address   string
	Namespace string
	// Progress, if not nil, is given what the command writes to standard error.
	Progress io.Writer
}

// CohortFromEnv is the command as `make up` sets it up.
func CohortFromEnv() Cohort { return Cohort{} }

// Checkpoint is what `cohort checkpoint --json` prints. Times are in
// milliseconds.
type Checkpoint struct {
	Group    string             `json:"group"`
	Ref      string             `json:"ref"`
	Epoch    string             `json:"epoch"`
	Number   uint64             `json:"epoch_number"`
	StopMS   float64            `json:"stop_ms"`
	SkewMS   float64            `json:"skew_ms"`
	PhasesMS map[string]float64 `json:"phases_ms"`
	Members  []CheckpointMember `json:"members"`
}

// CheckpointMember is one member's part of a Checkpoint.
type CheckpointMember struct {
	ID           string  `json:"id"`
	Name         string  `json:"name"`
	StopMS       float64 `json:"stop_ms"`
	Processes    int     `json:"processes"`
	MemoryBytes  int64   `json:"memory_bytes"`
	StorageBytes int64   `json:"storage_bytes"`
	Image        string  `json:"image"`
	Digest       string  `json:"digest"`
}

// Phases is the order of a checkpoint's phases.
var Phases = []string{"prepare", "close", "freeze", "capture", "release", "seal", "export"}

// Checkpoint checkpoints a group, its members running on. more are further
// options, such as --stop.
func (c Cohort) Checkpoint(ctx context.Context, group, ref string, more ...string) (Checkpoint, error) {
	var r Checkpoint
	args := append([]string{"checkpoint", "--json"}, more...)
	out, err := c.Do(ctx, append(args, group, ref)...)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, fmt.Errorf("cohort checkpoint --json printed %q: %w", out, err)
	}
	return r, nil
}

// Restored is what `cohort restore --json` prints.
type Restored struct {
	Group    string             `json:"group"`
	Ref      string             `json:"ref"`
	Members  []RestoredMember   `json:"members"`
	TotalMS  float64            `json:"total_ms"`
	PhasesMS map[string]float64 `json:"phases_ms"`
	Warnings []string           `json:"warnings"`
}

// RestoredMember is one container of a Restored.
type RestoredMember struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	Pid  int    `json:"pid"`
}

// Restore creates a group's containers from its image. more are further
// options, such as --id-suffix.
func (c Cohort) Restore(ctx context.Context, ref string, more ...string) (Restored, error) {
	var r Restored
	args := append([]string{"restore", "--json"}, more...)
	out, err := c.Do(ctx, append(args, ref)...)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, fmt.Errorf("cohort restore --json printed %q: %w", out, err)
	}
	return r, nil
}

// Do runs one cohort command and returns what it printed.
func (c Cohort) Do(ctx context.Context, args ...string) (string, error) {
	cmd := []string{c.Bin}
	if c.Bin == "" {
		cmd[0] = "cohort"
	}
	cmd = append(cmd, args[0])
	if c.Address != "" {
		cmd = append(cmd, "--address", c.Address)
	}
	if c.Namespace != "" {
		cmd = append(cmd, "--namespace", c.Namespace)
	}
	return run(ctx, append(cmd, args[1:]...), c.Progress)
}
