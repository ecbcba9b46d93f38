// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/events"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// restoreLease is how long members that are being restored wait for a command that
// has gone, and some.
const restoreLease = 15 * time.Second

// rebirth is one restore of a killer's group that something is done to.
type rebirth struct {
	*killer
	what   string
	cmd    *command
	events <-chan *events.Envelope
	errs   <-chan error
}

// restoring begins to restore the group from ref in the background.
func (k *killer) restoring(what, ref string) *rebirth {
	k.Helper()
	k.n++
	r := &rebirth{killer: k, what: fmt.Sprintf("restore %d, %s", k.n, what)}
	// Of all topics: their order tells how far it is.
	r.events, r.errs = k.in.Client(k).EventService().Subscribe(k.ctx)
	path, err := k.in.LookPath("cohort")
	k.must(err)
	r.cmd = startCommand(k.ctx, k.in.Env, path, "restore", "--json", ref)
	return r
}

// reach waits for the n-th event of a topic.
func (r *rebirth) reach(topic string, n int) {
	r.Helper()
	for n > 0 {
		select {
		case e := <-r.events:
			if e.Topic == topic {
				n--
			}
		case err := <-r.errs:
			r.Fatalf("%s: containerd's events: %v", r.what, err)
		case <-r.cmd.done:
			r.Logf("%s: it was ready before", r.what)
			return
		}
	}
}

// settled expects that nobody is half restored any more: a member runs, or has no
// process; no CRIU and no rule is left.
func (r *rebirth) settled() (running int) {
	r.Helper()
	var last error
	deadline := time.Now().Add(restoreLease)
	for ; time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if last = errors.Join(r.in.Leaks(), r.heldNamespaces()); last == nil {
			break
		}
	}
	if last != nil {
		r.Fatalf("%s: left behind: %v", r.what, last)
	}
	list, err := r.in.CtrOf(harness.CohortOnCohort).Containers(r.ctx)
	r.must(err)
	for _, id := range r.ids {
		pid, err := r.in.CtrOf(harness.CohortOnCohort).Pid(r.ctx, id)
		if err != nil || pid == 0 || !slices.Contains(list, id) {
			continue
		}
		var report programs.Ticker
		if err := programs.AskVerified(r.ctx, pid, reportPath, &report); err != nil {
			r.Errorf("%s: container %s has the process %d and does not run: %v", r.what, id, pid, err)
		}
		running++
	}
	return running
}

// heldNamespaces looks for communication rules in the network namespaces that were made
// for restored groups. Those of a container that waits for somebody to start or delete
// it are its own.
func (r *rebirth) heldNamespaces() error {
	var errs []error
	paths, _ := filepath.Glob(filepath.Join(r.in.State, "netns", "*"))
	for _, path := range paths {
		names, err := tablesOf(path)
		names = slices.DeleteFunc(names, func(name string) bool {
			return r.tasks()[strings.TrimPrefix(name, "cohort-restore-")] == "CREATED"
		})
		if err == nil && len(names) > 0 {
			errs = append(errs, fmt.Errorf("rules %v in %s", names, path))
		}
	}
	return errors.Join(errs...)
}

// tasks are the states that containerd tells, by container.
func (w *world) tasks() map[string]string {
	w.Helper()
	out := map[string]string{}
	for line := range strings.Lines(w.ctr("tasks", "ls")) {
		if f := strings.Fields(line); len(f) == 3 { // TASK PID STATUS
			out[f[0]] = f[2]
		}
	}
	return out
}

func TestRestoreThatWasKilledLeavesNobodyHalfRestored(t *testing.T) {
	k := newKiller(t)
	before := k.reports()
	ref := k.image("restore")
	k.checkpoint(ref)
	k.remove(k.ids...)
	for _, m := range []struct {
		what, topic string
		n           int
		signal      syscall.Signal
	}{
		{"killed when a container was created", "/containers/create", 1, syscall.SIGKILL},
		{"killed when a task was created", "/tasks/create", 1, syscall.SIGKILL},
		{"killed when all tasks were created", "/tasks/create", 3, syscall.SIGKILL},
		{"killed when a member ran", "/tasks/start", 1, syscall.SIGKILL},
		{"interrupted when a task was created", "/tasks/create", 2, syscall.SIGINT},
		{"interrupted when all tasks were created", "/tasks/create", 3, syscall.SIGINT},
	} {
		r := k.restoring(m.what, ref)
		r.reach(m.topic, m.n)
		if m.n == 3 {
			// CRIU is at work now, or holds complete members.
			time.Sleep(time.Duration(k.rng.IntN(200)) * time.Millisecond)
		}
		_ = r.cmd.cmd.Process.Signal(m.signal) // it may have ended
		_, err := r.cmd.wait()
		running := r.settled()
		list, listErr := k.in.CtrOf(harness.CohortOnCohort).Containers(k.ctx)
		k.must(listErr)
		left := slices.DeleteFunc(slices.Clone(k.ids), func(id string) bool { return !slices.Contains(list, id) })
		t.Logf("%s: %d containers are left, %d of them run; %v", r.what, len(left), running, err)
		switch {
		case err == nil && running != 3:
			t.Errorf("%s: it succeeded, and %d members run", r.what, running)
		case m.signal == syscall.SIGINT && err != nil && len(left) > 0:
			t.Errorf("%s: the containers %v are left", r.what, left)
		case m.signal == syscall.SIGINT && err != nil && exitCode(err) != 1:
			t.Errorf("%s: exit code %d", r.what, exitCode(err))
		case len(left) > 0:
			// The cure that the next attempt names must work.
			e := k.failure("restore", ref)
			k.says(e, 1, "exists", "delete it")
			k.remove(left...)
		}
		k.restoredAgain(r.what, ref, before)
	}
}

// restoredAgain expects the next restore under the same names to succeed, and removes it.
func (k *killer) restoredAgain(what, ref string, before map[string]programs.Ticker) {
	k.Helper()
	out, err := k.in.Cohort(k.ctx, "restore", "--json", ref)
	if err != nil {
		k.Fatalf("%s: the next restore fails: %v", what, err)
	}
	var r shop.Restored
	k.must(decodeJSON(out, &r))
	for _, m := range r.Members {
		k.goesOn(m.Pid, before[m.Name])
	}
	k.remove(k.ids...)
	// cohortd looks for what a dead command has left every two seconds.
	harness.Eventually(k, recovery, func() error {
		var errs []error
		for _, kind := range []string{"netns", "restores/" + k.in.Namespace()} {
			left, err := os.ReadDir(filepath.Join(k.in.State, kind))
			errs = append(errs, err)
			for _, e := range left {
				errs = append(errs, fmt.Errorf("%s: %s/%s is left", what, kind, e.Name()))
			}
		}
		return errors.Join(errs...)
	})
}
