// SPDX-License-Identifier: Apache-2.0

// Command cohort checkpoints and restores groups of containers.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/spf13/cobra"

	"github.com/cohort-project/cohort/api/version"
	"github.com/cohort-project/cohort/runtime/ops"
)

// Exit codes, documented in docs/cli.md.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3
)

// options are common to all commands.
type options struct {
	address   string
	namespace string
	json      bool
	out       io.Writer
	err       io.Writer
}

// usageError is wrong usage: exit code 2.
type usageError struct{ error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	// What libraries log (ttrpc, of answers that come too late) is nothing that
	// the command's users could act on.
	_ = log.SetLevel("panic")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot(stdout, stderr)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("interrupted: %w", err)
	}
	fmt.Fprintf(stderr, "cohort: %v\n", err)
	return exitCode(err)
}

func exitCode(err error) int {
	var u usageError
	var r *ops.RefusedError
	switch {
	case errors.As(err, &r):
		return exitRefused
	case errors.As(err, &u), errdefs.IsInvalidArgument(err):
		return exitUsage
	}
	return exitFailed
}

func newRoot(stdout, stderr io.Writer) *cobra.Command {
	o := &options{out: stdout, err: stderr}
	root := &cobra.Command{
		Use:   "cohort",
		Short: "Checkpoint and restore groups of containers as one",
		Long: `cohort checkpoints a group of containers at one consistent cut - memory,
storage and network - into OCI images, and brings the group back by creating
containers from those images.

Containers take part when they are created with the runtime
io.containerd.cohort.v2 on the snapshotter "cohort"; those that carry the same
annotation io.cohort.group are a group.`,
		Example: `  ctr run -d --runtime io.containerd.cohort.v2 --snapshotter cohort \
      --annotation io.cohort.group=shop --annotation io.cohort.member=db IMAGE db
  cohort checkpoint shop registry.example/shop:1
  cohort restore registry.example/shop:1`,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("unknown command %q; see 'cohort --help'", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	f := root.PersistentFlags()
	f.StringVarP(&o.address, "address", "a", env("CONTAINERD_ADDRESS", defaults.DefaultAddress), "containerd's gRPC socket [CONTAINERD_ADDRESS]")
	f.StringVarP(&o.namespace, "namespace", "n", env("CONTAINERD_NAMESPACE", namespaces.Default), "containerd namespace [CONTAINERD_NAMESPACE]")
	f.BoolVar(&o.json, "json", false, "print one JSON document (schema: docs/cli.md)")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage("%w; see '%s --help'", err, cmd.CommandPath()) })
	root.AddCommand(
		checkpointCommand(o), restoreCommand(o), psCommand(o), imagesCommand(o), inspectCommand(o), checkCommand(o),
		pruneCommand(o), mergeCommand(o), scheduleCommand(o),
	)
	for _, c := range root.Commands() {
		inner := c.Args
		c.Args = func(cmd *cobra.Command, args []string) error {
			if inner == nil {
				return nil
			}
			if err := inner(cmd, args); err != nil {
				return usage("%w; see 'cohort %s --help'", err, cmd.Name())
			}
			return nil
		}
	}
	return root
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// host runs f with a connection to containerd.
func (o *options) host(cmd *cobra.Command, f func(context.Context, *ops.Host) error) error {
	h, err := ops.Open(o.address, o.namespace)
	if err != nil {
		return err
	}
	defer h.Close()
	return f(h.Context(cmd.Context()), h)
}
