// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"bytes"
	"context"
	"os/exec"
	"time"

	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// runCommand runs a program to its end and returns its standard output.
func runCommand(ctx context.Context, env []string, path string, args ...string) (string, error) {
	c := startCommand(ctx, env, path, args...)
	return c.wait()
}

// command is a program that runs, so that something can be done to it meanwhile.
type command struct {
	cmd       *exec.Cmd
	out, errs bytes.Buffer
	done      chan struct{}
	err       error
}

func startCommand(ctx context.Context, env []string, path string, args ...string) *command {
	c := &command{cmd: exec.CommandContext(ctx, path, args...), done: make(chan struct{})}
	c.cmd.Env = env
	// A grandchild that keeps the pipes open must not keep this waiting.
	c.cmd.WaitDelay = 5 * time.Second
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.errs
	if c.err = c.cmd.Start(); c.err != nil {
		close(c.done)
		return c
	}
	go func() {
		c.err = c.cmd.Wait()
		close(c.done)
	}()
	return c
}

// wait returns the standard output when the program has ended. The error of one that
// failed is a *shop.CommandError.
func (c *command) wait() (string, error) {
	<-c.done
	if c.err != nil {
		return c.out.String(), &shop.CommandError{Args: c.cmd.Args, Stderr: c.errs.String(), Err: c.err}
	}
	return c.out.String(), nil
}
