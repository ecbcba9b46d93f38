// SPDX-License-Identifier: Apache-2.0

// Demo is `make demo`: a shop of three containers under load is checkpointed
// as one, destroyed, and restored by creating containers from the checkpoint's
// images; then its four invariants are checked (package shop).
//
// It uses the containerd of CONTAINERD_ADDRESS, or else has `make up` start
// the project's own and `make down` end it again. With --keep the restored
// shop, its images and that containerd stay, to look closer.
//
// Exit code 0: every invariant held. 1: one did not, or a step failed. 2:
// wrong usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cohort-project/cohort/api/version"
)

func main() {
	d := &demo{}
	// `make demo KEEP=1` arrives here by the environment.
	flag.BoolVar(&d.keep, "keep", os.Getenv("KEEP") != "", "leave the restored shop, its images and the containerd running (or KEEP=1)")
	flag.IntVar(&d.workers, "workers", 8, "load clients")
	flag.Float64Var(&d.rate, "rate", 400, "orders a second of all clients")
	flag.StringVar(&d.ref, "ref", "demo.local/shop:1", "name of the checkpoint")
	flag.DurationVar(&d.limit, "limit", 3*time.Minute, "longest that everything after the set-up may take")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println("demo", version.String())
		return
	}
	if flag.NArg() > 0 || d.workers < 1 || d.rate <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := d.run(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// run takes every step, and leaves nothing behind whichever of them fails.
func (d *demo) run(ctx context.Context) (err error) {
	begin := time.Now()
	fmt.Println("cohort demo: a shop of three containers is checkpointed, destroyed and restored under load")
	fmt.Println()
	defer func() {
		if cleanErr := d.cleanUp(context.WithoutCancel(ctx)); cleanErr != nil {
			err = errors.Join(err, fmt.Errorf("cleaning up: %w", cleanErr))
		}
	}()
	if err := d.setUp(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.limit, fmt.Errorf("the demo took longer than %v", d.limit))
	defer cancel()
	for _, step := range []func(context.Context) error{
		d.start, d.load, d.checkpoint, d.goOn, d.destroy, d.restore, d.loadAgain, d.check,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	d.summary(time.Since(begin))
	return nil
}
