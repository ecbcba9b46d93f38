// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
	barrier "github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/ops"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the kill tests; 0 draws one")

// recovery is how long a group may take to run again as if nothing had been: the
// lease, which is three seconds, and some for undoing and for a busy machine.
const recovery = 10 * time.Second

// killer is one kill test: a group of three that goes through many epochs.
type killer struct {
	*group
	rng *rand.Rand
	n   int
}

func newKiller(t *testing.T) *killer {
	w := setUp(t)
	w.longer(5 * time.Minute)
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("again: go test ./integration/lifecycle -run '^%s$' -seed %d", t.Name(), seed)
	return &killer{group: w.tickers(3), rng: rand.New(rand.NewPCG(seed, 0))}
}

// epoch is one epoch of a killer.
type epoch struct {
	*killer
	what string
	ref  string
	cmd  *command
	seen *watch
	gone []int // members whose shim was killed

	created   <-chan *events.Envelope // names that images are given
	eventErrs <-chan error
}

// begin starts a checkpoint in the background.
func (k *killer) begin(what string, options ...string) *epoch {
	k.Helper()
	k.n++
	e := &epoch{killer: k, what: fmt.Sprintf("epoch %d, %s", k.n, what), ref: k.image("kill")}
	e.seen = k.watchDir(k.epochsDir())
	e.created, e.eventErrs = k.subscribe(k.ctx, "/images/create")
	path, err := k.in.LookPath("cohort")
	k.must(err)
	args := append(append([]string{"checkpoint", "--json"}, options...), k.name, e.ref)
	e.cmd = startCommand(k.ctx, k.in.Env, path, args...)
	return e
}

// reach waits for a moment of the i-th member, and returns its record; nil if the
// epoch was over before.
func (e *epoch) reach(i int, p point) *journal.Epoch {
	e.Helper()
	ctx, cancel := context.WithCancelCause(e.ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-e.cmd.done:
			cancel(errors.New("the command has ended"))
		case <-ctx.Done():
		}
	}()
	rec, err := e.seen.until(ctx, e.ids[i], p)
	if err != nil {
		e.Logf("%s: %v", e.what, err)
	}
	return rec
}

// kill kills a process that may have ended by itself.
func (e *epoch) kill(p journal.Proc) {
	e.Helper()
	if err := harness.KillProcess(e.ctx, p); err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, syscall.ESRCH) {
		e.Fatalf("%s: %v", e.what, err)
	}
}

// killCommand kills the command unless it has ended.
func (e *epoch) killCommand() {
	e.Helper()
	if err := e.cmd.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		e.Fatalf("%s: %v", e.what, err)
	}
}

// ended waits for the command and tells whether it succeeded.
func (e *epoch) ended() bool {
	e.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	select {
	case <-e.cmd.done:
	case <-limit.C:
		e.Fatalf("%s: the command goes on and on", e.what)
	}
	_, err := e.cmd.wait()
	if err != nil {
		e.Logf("%s: %v", e.what, err)
	}
	return err == nil
}

// thawed expects members to run, whoever else is still down.
func (e *epoch) thawed() {
	e.Helper()
	for i, id := range e.ids {
		if slices.Contains(e.gone, i) {
			continue
		}
		ctx, cancel := context.WithTimeout(e.ctx, recovery)
		defer cancel()
		if err := e.runs(ctx, id); err != nil {
			e.Fatalf("%s: %v", e.what, err)
		}
	}
}

// recovered expects that nothing of the epoch is left, and that everybody runs.
func (e *epoch) recovered() {
	e.Helper()
	e.thawed()
	start := time.Now()
	for {
		err := e.in.Leaks()
		if err == nil {
			break
		}
		if time.Since(start) > recovery {
			e.Fatalf("%s: left behind: %v", e.what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	e.whole()
	e.sealedOnes()
}

// whole expects the epoch's image to be there with all its members and to be
// restorable, or not to be there at all.
func (e *epoch) whole() {
	e.Helper()
	all, err := e.in.Client(e).ImageService().List(namespaces.WithNamespace(e.ctx, e.in.Namespace()))
	e.must(err)
	var names []string // those that stay
	group := false
	for _, i := range all {
		// Until the group has its name, those of its members are due to be collected.
		if _, expires := i.Labels["containerd.io/gc.expire"]; i.Name == e.ref || strings.HasPrefix(i.Name, e.ref+"-") && !expires {
			names = append(names, i.Name)
			group = group || i.Name == e.ref
		}
	}
	switch {
	case group:
		// Names that expire stay as long as the group's does.
		if have := e.images(e.ref); len(have) != 1+len(e.ids) {
			e.Errorf("%s: the group's image is listed without all its members': %v", e.what, have)
		}
		ids := e.restored(e.ref, fmt.Sprintf("-r%d", e.n), nil)
		e.remove(ids...)
	case len(names) > 0:
		e.Errorf("%s: members' images are listed without the group's: %v", e.what, names)
	}
}

// sealedOnes expects of every capture that stayed that cohortd will know what to do with
// it, and discards it.
func (e *epoch) sealedOnes() {
	e.Helper()
	for _, c := range e.captures() {
		if c.State != "sealed" || c.Labels["group"] != e.name {
			continue
		}
		if c.Labels["stop"] != "false" {
			e.Errorf("%s: a sealed capture of an epoch that was to go on says stop=%q", e.what, c.Labels["stop"])
		}
		e.discard(c.Id)
	}
}

// reborn starts the members again that have died.
func (e *epoch) reborn() {
	e.Helper()
	for _, i := range e.gone {
		e.remove(e.ids[i])
		e.start(i)
	}
	e.gone = nil
}

// again expects the next checkpoint to succeed.
func (e *epoch) again() {
	e.Helper()
	e.reborn()
	ref := e.image("next")
	out, err := e.in.Cohort(e.ctx, "checkpoint", "--json", e.name, ref)
	if err != nil {
		e.Fatalf("%s: the next checkpoint fails: %v", e.what, err)
	}
	if !strings.Contains(out, ref) {
		e.Errorf("%s: the next checkpoint printed %q", e.what, out)
	}
}

// some draws moments of a live epoch, in any order; each is drawn once.
func (k *killer) some(n int, of []point) []point {
	of = slices.Clone(of)
	k.rng.Shuffle(len(of), func(i, j int) { of[i], of[j] = of[j], of[i] })
	return of[:min(n, len(of))]
}

// anyone draws a member.
func (k *killer) anyone() int { return k.rng.IntN(len(k.ids)) }

func TestKilledCommandLeavesNothing(t *testing.T) {
	k := newKiller(t)
	moments := append(k.some(4, points(false)[:12]), point{barrier.Sealed, true}, point{barrier.Sealed, false})
	for _, p := range moments {
		e := k.begin(fmt.Sprintf("the command killed when a member was %v", p))
		e.reach(k.anyone(), p)
		e.killCommand()
		if e.ended() {
			e.Logf("%s: it was ready before", e.what)
		}
		e.recovered()
	}
	// The names are given within a few milliseconds, at the very end.
	for range 2 {
		e := k.begin("the command killed while it names the images")
		e.named(e.ref + "-" + k.members[0])
		e.killCommand()
		e.ended()
		e.recovered()
	}
	e := k.begin("the command killed at any time")
	time.Sleep(time.Duration(k.rng.IntN(1500)) * time.Millisecond)
	e.killCommand()
	e.ended()
	e.recovered()
	e.again()
}

// A group that is to end has no way back once the first of it is dead: then what all of
// them have sealed must stay.
func TestKilledCommandOfAStoppingGroupKeepsWhatItHasKilledFor(t *testing.T) {
	k := newKiller(t)
	moments := append(k.some(2, points(true)[:8]), point{barrier.Sealed, false}, point{barrier.Stopped, true}, point{barrier.Stopped, false})
	for _, p := range moments {
		e := k.begin(fmt.Sprintf("the command killed when a member was %v, to be stopped", p), "--stop")
		e.reach(k.anyone(), p)
		e.killCommand()
		exported := e.ended()
		harness.Eventually(t, recovery, e.in.Leaks)
		states := k.states()
		for i, id := range k.ids {
			switch states[id] {
			case "running":
			case "stopped":
				e.gone = append(e.gone, i)
			default:
				t.Errorf("%s: container %s is %s", e.what, id, states[id])
			}
		}
		e.thawed()
		sealed := 0
		for _, c := range e.captures() {
			if c.State != "sealed" || c.Labels["stop"] != "true" || c.Labels["group"] != k.name {
				t.Errorf("%s: capture %s is %s, with %v", e.what, c.Id, c.State, c.Labels)
			}
			sealed++
		}
		images := k.images(e.ref)
		t.Logf("%s: %d of 3 are dead, %d captures are sealed, %d images", e.what, len(e.gone), sealed, len(images))
		if len(e.gone) > 0 && sealed < 3 && len(images) < 4 && !exported {
			t.Errorf("%s: %d members were killed and only %d captures are kept", e.what, len(e.gone), sealed)
		}
		for _, c := range e.captures() {
			e.discard(c.Id)
		}
		e.again()
	}
}

func TestKilledCohortdFailsTheEpochAndLeavesNothing(t *testing.T) {
	k := newKiller(t)
	moments := append(k.some(3, points(false)), point{barrier.Captured, true}, point{barrier.Sealed, true})
	for _, p := range moments {
		e := k.begin(fmt.Sprintf("cohortd killed when a member was %v", p))
		e.reach(k.anyone(), p)
		k.in.KillDaemon(t, harness.Cohortd)
		e.ended()
		e.thawed() // also while it is down
		k.in.Restart(t)
		e.recovered()
		e.again()
	}
}

func TestKilledShimTakesOnlyItsContainerWithIt(t *testing.T) {
	k := newKiller(t)
	moments := append(k.some(3, points(false)), point{barrier.Frozen, false}, point{barrier.Captured, true})
	for _, p := range moments {
		e := k.begin(fmt.Sprintf("a shim killed when its member was %v", p))
		i := k.anyone()
		shim := k.in.Shim(t, k.ids[i])
		e.reach(i, p)
		e.kill(shim)
		e.gone = []int{i}
		e.ended()
		e.recovered()
		e.again()
	}
}

// CRIU's code lets go of a process by itself when CRIU has gone, except for the few
// milliseconds in which it is put there: a CRIU that is killed just then may take the
// process with it. Nobody else notices, and never a whole epoch is made of it.
func TestKilledCRIUFailsTheEpochAndLeavesTheOthersRunning(t *testing.T) {
	k := newKiller(t)
	died := 0
	for n := range 6 {
		p := point{barrier.Captured, true}
		if n < 2 {
			p = point{barrier.Prepared, false}
		}
		i := k.anyone()
		e := k.begin(fmt.Sprintf("CRIU of a member killed when that was %v", p))
		rec := e.reach(i, p)
		if rec == nil {
			t.Fatalf("%s: the moment was missed", e.what)
		}
		if p.begun {
			time.Sleep(time.Duration(k.rng.IntN(80)) * time.Millisecond)
		}
		e.kill(rec.Criu)
		if e.ended() {
			e.Logf("%s: it was ready before", e.what)
		}
		if p.begun && !e.alive(i) {
			died++
			e.gone = []int{i}
		}
		e.recovered()
		e.again()
	}
	t.Logf("%d of 4 members died of a CRIU that was killed in mid-dump", died)
}

// alive tells whether a member has outlived what was done to it.
func (e *epoch) alive(i int) bool {
	ctx, cancel := context.WithTimeout(e.ctx, recovery)
	defer cancel()
	err := e.runs(ctx, e.ids[i])
	if err == nil {
		return true
	}
	e.Logf("%s: %v", e.what, err)
	// What is left of it must be plain to see.
	for _, s := range decode[[]ops.Status](e.world, "ps") {
		if s.ID == e.ids[i] && s.State != "stopped" {
			e.Errorf("%s: container %s is %s and does not run", e.what, s.ID, s.State)
		}
	}
	return false
}

func TestKilledContainerdLeavesNothing(t *testing.T) {
	k := newKiller(t)
	moments := append(k.some(2, points(false)), point{barrier.Captured, true}, point{barrier.Sealed, false})
	for _, p := range moments {
		e := k.begin(fmt.Sprintf("containerd killed when a member was %v", p))
		e.reach(k.anyone(), p)
		k.in.KillDaemon(t, harness.Containerd)
		e.ended()
		e.thawed() // also while it is down
		k.in.Restart(t)
		e.recovered()
		e.again()
	}
}

func TestInterruptedCommandUndoesAllItHasBegun(t *testing.T) {
	k := newKiller(t)
	for _, p := range k.some(5, points(false)) {
		e := k.begin(fmt.Sprintf("interrupted when a member was %v", p))
		e.reach(k.anyone(), p)
		_ = e.cmd.cmd.Process.Signal(syscall.SIGINT) // it may have ended
		_, err := e.cmd.wait()
		if err == nil {
			e.Logf("%s: it was ready before", e.what)
		} else if code := exitCode(err); code != 1 || !strings.Contains(err.Error(), "interrupted") {
			e.Errorf("%s: exit code %d: %v", e.what, code, err)
		}
		// It has put everything back itself, and waited for it.
		if err := e.in.Leaks(); err != nil {
			e.Errorf("%s: left behind by the command: %v", e.what, err)
		}
		e.recovered()
		if left := e.captures(); len(left) > 0 {
			e.Errorf("%s: captures stayed: %v", e.what, left)
		}
	}
	(&epoch{killer: k, what: "after all"}).again()
}

func TestTooShortTimeoutUndoesAll(t *testing.T) {
	k := newKiller(t)
	before := k.reports()
	for _, limit := range []string{"1ms", "10ms"} {
		ref := k.image("short")
		err := k.failure("checkpoint", "--timeout", limit, k.name, ref)
		if err.ExitCode() != 1 || !strings.Contains(err.Stderr, limit) || !strings.Contains(err.Stderr, "capture") {
			t.Errorf("it exits with %d and says %q", err.ExitCode(), err.Stderr)
		}
		if err := k.in.Leaks(); err != nil {
			t.Errorf("left behind: %v", err)
		}
		if names := k.images(ref); len(names) > 0 {
			t.Errorf("images are listed: %v", names)
		}
		if left := k.captures(); len(left) > 0 {
			t.Errorf("captures stayed: %v", left)
		}
	}
	for name, r := range k.reports() {
		if r.Writes <= before[name].Writes {
			t.Errorf("member %s stands still", name)
		}
	}
	(&epoch{killer: k, what: "a group whose checkpoint was too slow"}).again()
}

func exitCode(err error) int {
	var failed *shop.CommandError
	if errors.As(err, &failed) {
		return failed.ExitCode()
	}
	return -1
}

// named waits for an image's name.
func (e *epoch) named(name string) {
	e.Helper()
	for {
		select {
		case env := <-e.created:
			if i := decodeEvent[imageCreate](env); i != nil && i.Name == name {
				return
			}
		case err := <-e.eventErrs:
			e.Fatalf("%s: containerd's events: %v", e.what, err)
		case <-e.cmd.done:
			e.Logf("%s: it was ready before", e.what)
			return
		}
	}
}

// runs expects a member to answer.
func (g *group) runs(ctx context.Context, id string) error {
	var r programs.Ticker
	if err := programs.Ask(ctx, g.pids[id], reportPath, &r); err != nil {
		return fmt.Errorf("container %s does not run: %w", id, err)
	}
	if !r.SumOK {
		return fmt.Errorf("container %s has lost memory", id)
	}
	return nil
}
