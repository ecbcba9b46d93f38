// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Ctr is the stock command-line client of one containerd. It may be used
// concurrently.
type Ctr struct {
	// Bin is the program, "ctr" of the PATH if empty.
	Bin string
	// Address and Namespace as of ctr's options; empty leaves them to ctr,
	// which takes CONTAINERD_ADDRESS and CONTAINERD_NAMESPACE.
	Address   string
	Namespace string
	// Runtime and Snapshotter of the containers that are run.
	Runtime     string
	Snapshotter string
}

// CtrFromEnv is ctr as `make up` sets it up, running containers with cohort.
func CtrFromEnv() Ctr {
	return Ctr{Runtime: "io.containerd.cohort.v2", Snapshotter: "cohort"}
}

// Container is what Run is told of a container.
type Container struct {
	ID    string
	Image string
	Args  []string
	Env   []string
	// Annotations are OCI annotations, "key=value".
	Annotations []string
	// NetNS is the path of the network namespace to join; empty for a new one.
	NetNS string
	// Log is a host file for the output; empty discards it. Left to itself,
	// ctr connects a detached container to pipes that nobody empties.
	Log string
	// More are further options of `ctr run`.
	More []string
}

// Do runs one ctr command and returns what it printed.
func (c Ctr) Do(ctx context.Context, args ...string) (string, error) {
	return run(ctx, c.command(args...), nil)
}

// command is the words of one ctr command.
func (c Ctr) command(args ...string) []string {
	cmd := []string{c.Bin}
	if c.Bin == "" {
		cmd[0] = "ctr"
	}
	if c.Address != "" {
		cmd = append(cmd, "--address", c.Address)
	}
	if c.Namespace != "" {
		cmd = append(cmd, "--namespace", c.Namespace)
	}
	return append(cmd, args...)
}

// RunArgs is the words of the command that Run runs.
func (c Ctr) RunArgs(k Container) []string {
	args := []string{"run", "--detach", "--runtime", c.Runtime, "--snapshotter", c.Snapshotter}
	if k.Log != "" {
		args = append(args, "--log-uri", "file://"+k.Log)
	} else {
		args = append(args, "--null-io")
	}
	for _, a := range k.Annotations {
		args = append(args, "--annotation", a)
	}
	for _, e := range k.Env {
		args = append(args, "--env", e)
	}
	if k.NetNS != "" {
		args = append(args, "--with-ns", "network:"+k.NetNS)
	}
	args = append(args, k.More...)
	return c.command(append(append(args, k.Image, k.ID), k.Args...)...)
}

// Run creates a container and starts it in the background.
func (c Ctr) Run(ctx context.Context, k Container) error {
	_, err := run(ctx, c.RunArgs(k), nil)
	return err
}

// Pid returns the host's pid of a running container's first process.
func (c Ctr) Pid(ctx context.Context, id string) (int, error) {
	out, err := c.Do(ctx, "tasks", "ls")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(out) {
		// TASK PID STATUS
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == id {
			if f[2] != "RUNNING" {
				return 0, fmt.Errorf("container %s is %s, not running", id, f[2])
			}
			return strconv.Atoi(f[1])
		}
	}
	return 0, fmt.Errorf("container %s has no task", id)
}

// Containers returns the ids of all containers.
func (c Ctr) Containers(ctx context.Context) ([]string, error) {
	out, err := c.Do(ctx, "containers", "ls", "-q")
	return strings.Fields(out), err
}

// Remove kills a container's processes and deletes it with its snapshot. A
// container that is not there is removed already.
func (c Ctr) Remove(ctx context.Context, id string) error {
	// A task that is not there is what is wanted; if it is there and cannot
	// be deleted, deleting the container says so too.
	_, taskErr := c.Do(ctx, "tasks", "delete", "--force", id)
	_, err := c.Do(ctx, "containers", "delete", id)
	if err == nil {
		return nil
	}
	if have, listErr := c.Containers(ctx); listErr == nil && !slices.Contains(have, id) {
		return nil
	}
	return errors.Join(err, taskErr)
}

// RemoveImages removes images by name; one that is not there is ignored.
func (c Ctr) RemoveImages(ctx context.Context, refs ...string) error {
	_, err := c.Do(ctx, append([]string{"images", "rm", "--sync"}, refs...)...)
	if err != nil && strings.Contains(err.Error(), "not found") {
		return nil
	}
	return err
}

// run runs one command to its end and returns its standard output; progress,
// if not nil, is given its standard error as it comes.
func run(ctx context.Context, args []string, progress io.Writer) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	// A grandchild that keeps the pipes open must not keep this waiting.
	cmd.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, io.Writer(&errs)
	if progress != nil {
		cmd.Stderr = io.MultiWriter(&errs, progress)
	}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return out.String(), &CommandError{Args: args, Stderr: errs.String(), Err: err}
	}
	return out.String(), nil
}

// CommandError is a command that failed.
type CommandError struct {
	Args   []string
	Stderr string
	Err    error
}

func (e *CommandError) Error() string {
	said := strings.TrimSpace(e.Stderr)
	if said == "" {
		said = "it said nothing"
	}
	return fmt.Sprintf("%s %s: %v: %s", filepath.Base(e.Args[0]), strings.Join(e.Args[1:], " "), e.Err, said)
}

func (e *CommandError) Unwrap() error { return e.Err }

// ExitCode is the command's exit code, -1 if it did not end by itself.
func (e *CommandError) ExitCode() int {
	var exit *exec.ExitError
	if errors.As(e.Err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

// ApplyExports sets the variables of the `export NAME=value` lines that
// `make up` prints, in this process's environment. Values may stand in single
// or double quotes; $NAME in an unquoted or double-quoted one is replaced.
func ApplyExports(lines string) error {
	for line := range strings.Lines(lines) {
		assignment, ok := strings.CutPrefix(strings.TrimSpace(line), "export ")
		if !ok {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimSuffix(assignment, ";"), "=")
		if !ok || name == "" {
			return fmt.Errorf("set-up printed %q, which sets nothing", strings.TrimSpace(line))
		}
		if bare, ok := unquote(value, '\''); ok {
			value = bare
		} else {
			value, _ = unquote(value, '"')
			value = os.ExpandEnv(value)
		}
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}

func unquote(s string, q byte) (string, bool) {
	if len(s) >= 2 && s[0] == q && s[len(s)-1] == q {
		return s[1 : len(s)-1], true
	}
	return s, false
}
