// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cohort-project/cohort/integration/shop"
	"github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/integration/shop/load"
)

const group = "shop"

// demo is what the steps know of each other.
type demo struct {
	keep    bool
	workers int
	rate    float64
	ref     string
	limit   time.Duration

	step int

	// root is the project's folder; ours tells that the containerd is too.
	root string
	ours bool
	dir  string

	ctr    harness.Ctr
	cohort harness.Cohort
	net    *harness.Net
	shop   *harness.Shop
	loader *harness.Load

	cut      harness.Checkpoint
	lost     int
	outside  bool
	felt     load.Summary
	evidence shop.Evidence
}

// setUp finds a containerd, or starts the project's own.
func (d *demo) setUp(ctx context.Context) error {
	defer d.title("set-up", "containerd, cohortd, images")()
	if os.Geteuid() != 0 {
		return errors.New("the demo makes containers and network namespaces: run it as root")
	}
	var err error
	if d.dir, err = os.MkdirTemp("", "cohort-demo-"); err != nil {
		return err
	}
	if os.Getenv("CONTAINERD_ADDRESS") == "" {
		if d.root, err = harness.ProjectRoot(); err != nil {
			return err
		}
		// One that is up already is somebody's, and stays. Else `make down` is
		// due from here on: `up` may fail half way.
		_, err := os.Stat(instanceDir(d.root))
		d.ours = errors.Is(err, fs.ErrNotExist)
		out, err := d.make(ctx, "up")
		if err != nil {
			return err
		}
		if err := harness.ApplyExports(out); err != nil {
			return fmt.Errorf("make up: %w", err)
		}
	}
	d.ctr, d.cohort = harness.CtrFromEnv(), harness.CohortFromEnv()
	for _, bin := range []string{"ctr", "cohort"} {
		if _, err := exec.LookPath(bin); err != nil {
			return fmt.Errorf(`no %s on the PATH; take the one of the set-up: eval "$(make -s up)": %w`, bin, err)
		}
	}
	version, err := d.ctr.Do(ctx, "version")
	if err != nil {
		return fmt.Errorf("no containerd answers at %s: %w", os.Getenv("CONTAINERD_ADDRESS"), err)
	}
	d.note("containerd %s at %s", serverVersion(version), os.Getenv("CONTAINERD_ADDRESS"))
	return d.unused(ctx)
}

// instanceDir is the folder of the project's own containerd.
func instanceDir(root string) string {
	if dir := os.Getenv("RUNDIR"); dir != "" {
		return dir
	}
	return filepath.Join(root, ".run")
}

// unused makes sure that no container of somebody else's, or of a demo that
// was told to keep its own, has the names that this one is about to use.
func (d *demo) unused(ctx context.Context) error {
	have, err := d.ctr.Containers(ctx)
	if err != nil {
		return err
	}
	for _, m := range (harness.Options{Group: group, Net: &harness.Net{}}).Members() {
		if slices.Contains(have, m.ID) {
			return fmt.Errorf("there is a container %[1]s already; remove it: ctr task rm --force %[1]s; ctr container rm %[1]s (or end the whole containerd, if it is the project's own: make down)", m.ID)
		}
	}
	return nil
}

// start runs the shop.
func (d *demo) start(ctx context.Context) (err error) {
	defer d.title("start", "PostgreSQL, Redis and a web application, one container each")()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if d.net, err = harness.NewNet(group); err != nil {
		return err
	}
	o := harness.Options{Ctr: d.ctr, Group: group, Net: d.net}
	members := o.Members()
	d.note("%s", wrap(d.ctr.RunArgs(members[0])))
	for _, m := range members[1:] {
		d.note("… and likewise %s: %s", m.ID, strings.Join(m.Args, " "))
	}
	d.shop, err = harness.StartShop(ctx, o)
	return err
}

// load has clients outside the group order without pause.
func (d *demo) load(ctx context.Context) (err error) {
	defer d.title("load", fmt.Sprintf("%d clients outside the group, %.0f orders a second", d.workers, d.rate))()
	if d.evidence.Before, err = d.shop.Query.State(ctx); err != nil {
		return err
	}
	if d.loader, err = d.shop.StartLoad(d.loadOptions("before")); err != nil {
		return err
	}
	// Two seconds' worth: a pool that is warm, a log that has grown.
	if err := d.wait(ctx, 2); err != nil {
		return err
	}
	log, err := d.loader.Log()
	if err != nil {
		return err
	}
	d.note("%d orders answered; an order is a PostgreSQL transaction, then an INCR in Redis", len(log.Acks))
	return nil
}

// checkpoint takes the cut while the clients go on.
func (d *demo) checkpoint(ctx context.Context) (err error) {
	defer d.title("checkpoint", fmt.Sprintf("cohort checkpoint --json %s %s", group, d.ref))()
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	d.evidence.Cut.From = time.Now()
	d.cut, err = d.cohort.Checkpoint(ctx, group, d.ref)
	d.evidence.Cut.To = time.Now()
	if err != nil {
		return err
	}
	d.printCut()
	return nil
}

// goOn shows that the checkpoint disturbed nobody, and ends the load: what is
// ordered after the cut will be lost with the shop.
func (d *demo) goOn(ctx context.Context) error {
	defer d.title("go on", "the shop serves on, as if nothing had been")()
	if err := d.wait(ctx, 2); err != nil {
		return err
	}
	var err error
	if d.felt, d.evidence.Load, err = d.loader.Stop(); err != nil {
		return err
	}
	s, err := d.shop.Query.State(ctx)
	if err != nil {
		return fmt.Errorf("the shop does not answer after its checkpoint: %w", err)
	}
	when := "not during the checkpoint"
	if at := d.felt.MaxGapAt; !at.Before(d.evidence.Cut.From) && at.Before(d.evidence.Cut.To) {
		when = "during the checkpoint"
	}
	d.note("%d orders answered, %d failed; the longest time without an answer to any client was %.1f ms, %s",
		d.felt.Acked, d.felt.ConnErrors+d.felt.Refused+d.felt.Timeouts, d.felt.MaxGapMS, when)
	if s.PoolErrors+s.Reconnects > 0 || s.BootID != d.evidence.Before.BootID {
		return fmt.Errorf("the checkpoint broke the running shop: %d errors, %d connections made again: %s", s.PoolErrors, s.Reconnects, s.LastError)
	}
	d.lost = int(s.PGCount)
	return nil
}

// destroy leaves nothing of the shop but the images.
func (d *demo) destroy(ctx context.Context) error {
	defer d.title("destroy", "every process, container, snapshot and the network namespace")()
	if err := d.shop.Destroy(ctx); err != nil {
		return err
	}
	return d.net.CloseGroup()
}

// restore makes the shop from its images.
func (d *demo) restore(ctx context.Context) (err error) {
	defer d.title("restore", "cohort restore "+d.ref)()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	back, err := d.cohort.Restore(ctx, d.ref)
	if err != nil {
		return err
	}
	d.note("%d containers created from %s-* and released together in %.0f ms", len(back.Members), d.ref, back.TotalMS)
	for _, w := range back.Warnings {
		d.note("warning: %s", w)
	}
	if d.shop, err = d.shop.Restored(ctx, ""); err != nil {
		return err
	}
	if d.outside = d.shop.NetNS == d.net.ClientPath(); d.outside {
		d.note("it answers at its old address to clients in their old place")
	} else {
		d.note("it answers at its old address, %s, in its rebuilt network namespace", d.shop.Addr)
	}
	if d.evidence.Restored, err = d.shop.Query.State(ctx); err != nil {
		return err
	}
	if d.evidence.Orders, err = d.shop.Query.Orders(ctx); err != nil {
		return err
	}
	at := d.evidence.Restored
	d.note("it has %d orders, those before the cut; the %d after it went with the old shop", at.PGCount, d.lost-int(at.PGCount))
	return nil
}

// loadAgain has clients order from the restored shop.
func (d *demo) loadAgain(ctx context.Context) (err error) {
	defer d.title("load again", "new clients, the same shop")()
	if d.loader, err = d.shop.StartLoad(d.loadOptions("after")); err != nil {
		return err
	}
	waitErr := d.wait(ctx, 2)
	again, log, err := d.loader.Stop()
	if err = errors.Join(waitErr, err); err != nil {
		return err
	}
	d.evidence.After = log
	d.note("%d orders answered, %d failed", again.Acked, again.ConnErrors+again.Refused+again.Timeouts)
	s, err := d.shop.Query.State(ctx)
	if err != nil {
		return err
	}
	d.evidence.AfterState = &s
	d.evidence.AfterOrders, err = d.shop.Query.Orders(ctx)
	return err
}

// check holds what was seen against the invariants.
func (d *demo) check(context.Context) error {
	defer d.title("check", "the four invariants")()
	err := shop.Check(d.evidence)
	d.printInvariants(err)
	if err != nil {
		return fmt.Errorf("the restored shop is not the one that was checkpointed:\n%w", err)
	}
	return nil
}

func (d *demo) loadOptions(name string) harness.LoadOptions {
	return harness.LoadOptions{Workers: d.workers, Rate: d.rate, Log: filepath.Join(d.dir, name+".jsonl")}
}

// wait returns when the load has been answered for so many seconds' worth of
// further orders, which takes far longer on a machine that is far too slow.
func (d *demo) wait(ctx context.Context, seconds float64) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	log, err := d.loader.Log()
	if err != nil {
		return err
	}
	return d.loader.WaitAcked(ctx, len(log.Acks)+int(seconds*d.rate))
}

// remove removes containers and images of the demo's names.
func (d *demo) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	refs := []string{d.ref}
	var errs []error
	for _, m := range (harness.Options{Ctr: d.ctr, Group: group, Net: &harness.Net{}}).Members() {
		errs = append(errs, d.ctr.Remove(ctx, m.ID))
		refs = append(refs, d.ref+strings.TrimPrefix(m.ID, group))
	}
	for _, ref := range refs {
		errs = append(errs, d.ctr.RemoveImages(ctx, ref))
	}
	return errors.Join(errs...)
}

// cleanUp leaves the machine as it was found, as far as it is told to.
func (d *demo) cleanUp(ctx context.Context) error {
	var errs []error
	if d.loader != nil {
		_, _, err := d.loader.Stop()
		errs = append(errs, err)
	}
	if d.dir != "" {
		errs = append(errs, os.RemoveAll(d.dir))
	}
	if d.keep {
		return errors.Join(errs...)
	}
	if d.shop != nil {
		errs = append(errs, d.remove(ctx))
	}
	if d.net != nil {
		errs = append(errs, d.net.Close())
	}
	if d.ours {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		_, err := d.make(ctx, "down")
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// make runs one of the project's make targets and returns what it printed; its
// progress goes to the terminal.
func (d *demo) make(ctx context.Context, target string) (string, error) {
	cmd := exec.CommandContext(ctx, "make", "--silent", "--no-print-directory", target)
	cmd.Dir = d.root
	// Told to end, make tells its children; killed, it would leave them.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Stderr = os.Stderr
	// This process may itself be make's, whose flags are not meant for this one.
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); name != "MAKEFLAGS" && name != "MAKELEVEL" && name != "MFLAGS" {
			cmd.Env = append(cmd.Env, v)
		}
	}
	out, err := cmd.Output()
	// Daemons that `up` leaves running may hold its pipes: not an error.
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return "", fmt.Errorf("make %s: %w", target, err)
	}
	return string(out), nil
}
