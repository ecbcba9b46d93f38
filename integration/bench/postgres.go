// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
	shopharness "github.com/cohort-project/cohort/integration/shop/harness"
)

// postgresCase is PostgreSQL as Debian packages it, with 128 MiB of shared buffers,
// under pgbench's own TPC-B-like transactions from outside the group. Stock
// containerd cannot take it while clients are connected, see shopCase.
type postgresCase struct {
	times times
	limit time.Duration
}

const (
	// around is how long the load is measured before and after each checkpoint.
	around = 3 * time.Second
	// pgbenchTail is how long pgbench goes on after that: what it has not yet
	// written when it is killed, a block of 4096 bytes, must not be missed.
	pgbenchTail = 2 * time.Second

	// Eight times 100,000 accounts, about as much as the shared buffers hold.
	pgbenchScale   = 8
	pgbenchClients = 4
	// pgbench is not on the image's PATH but in a wrapper that wants Perl.
	inPostgres = "for bin in /usr/lib/postgresql/*/bin; do :; done; "
)

func (postgresCase) name() string   { return result.PostgresCase }
func (postgresCase) memoryMiB() int { return 512 }

func (c postgresCase) run(ctx context.Context, b *bench) []result.Row {
	list := b.turnsOf(c.times, 0)
	seen := map[string][]throughput{}
	rotate(ctx, c.name(), b.plan.limit(c.limit), list, func(t *turns, n int) error {
		more, err := c.turn(ctx, b, t, n)
		seen[t.s.name] = append(seen[t.s.name], more...)
		return err
	})
	var rows []result.Row
	for _, t := range list {
		r := t.found.row(workload{title: c.name(), members: 2}, t.s.name)
		all := seen[t.s.name]
		r.RateBefore = result.Median(each(all, func(p throughput) float64 { return p.before }))
		r.RateDuring = result.Median(each(all, func(p throughput) float64 { return p.during }))
		r.RateAfter = result.Median(each(all, func(p throughput) float64 { return p.after }))
		r.ClientGap = result.Median(each(all, func(p throughput) float64 { return p.silence }))
		var slower []float64
		for _, p := range all {
			if s := result.SlowDown(p.before, p.during, p.after); s != nil {
				slower = append(slower, *s)
			}
		}
		r.SlowDown = result.Median(slower)
		rows = append(rows, r)
	}
	return rows
}

// turn starts PostgreSQL and pgbench and takes n checkpoints.
func (c postgresCase) turn(ctx context.Context, b *bench, t *turns, n int) (_ []throughput, err error) {
	g, err := b.newMembers(0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.gone(ctx, g)) }()
	g.flags, g.runcFlags = b.whole(), []string{"--tcp-established"}
	net, err := shopharness.NewNet("bench")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, net.Close()) }()
	starting, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()

	o := shopharness.Options{Ctr: b.in.CtrOf(t.s.runtime), Group: g.group, Net: net, Postgres: []string{"-c", "shared_buffers=128MB"}}
	db := o.Members()[0]
	db.Env = append(db.Env, "PGLISTEN=0.0.0.0")
	g.ids = append(g.ids, db.ID)
	if err := o.Ctr.Run(starting, db); err != nil {
		return nil, err
	}
	// Plain CRIU takes one container after the other: no other member could say
	// how long PostgreSQL stood still, its clients do.
	if t.s == cohort {
		if err := b.ticker(starting, g, t.s, net); err != nil {
			return nil, err
		}
	}
	p := pgbench{b: b, net: net, dir: g.dir, id: g.group + "-pgbench"}
	defer func() { err = errors.Join(err, p.stop(context.WithoutCancel(ctx))) }()
	if err := p.start(starting); err != nil {
		return nil, err
	}
	var windows []window
	for i := range n {
		if i > 0 {
			if err := t.s.drop(b, ctx, g); err != nil {
				return nil, err
			}
		}
		w, err := b.once(ctx, t, g, around)
		if err != nil {
			return nil, fmt.Errorf("checkpoint %d of %d: %w", i+1, n, err)
		}
		windows = append(windows, w)
		if err := pause(ctx, around); err != nil {
			return nil, err
		}
	}
	if err := pause(ctx, pgbenchTail); err != nil {
		return nil, err
	}
	if err := p.stop(ctx); err != nil {
		return nil, err
	}
	done, err := p.transactions()
	if err != nil {
		return nil, err
	}
	return each(windows, func(w window) throughput { return rates(done, w, around) }), nil
}

// pgbench is a load from outside the group, in a container of the stock shim.
type pgbench struct {
	b       *bench
	net     *shopharness.Net
	dir, id string
}

// start makes pgbench's tables, starts the load and returns when it has begun.
func (p pgbench) start(ctx context.Context) error {
	script := fmt.Sprintf(inPostgres+`until "$bin/pg_isready" -q; do sleep 0.1; done; "$bin/pgbench" -i -q -s %d && exec "$bin/pgbench" -n -M prepared -c %d -j 1 -T 3600 -l --log-prefix=/out/tx`,
		pgbenchScale, pgbenchClients)
	err := p.b.in.CtrOf(harness.Stock).Run(ctx, harness.Container{
		ID: p.id, Image: harness.DataImage, NetNS: p.net.ClientPath(),
		Args: []string{"/bin/sh", "-c", script},
		Env:  []string{"PGHOST=" + p.net.GroupIP, "PGUSER=postgres"},
		Log:  filepath.Join(p.dir, "pgbench.log"),
		More: []string{"--mount", "type=bind,src=" + p.dir + ",dst=/out,options=rbind:rw"},
	})
	if err != nil {
		return err
	}
	// The log is written in blocks: it has content when some hundred transactions
	// are done.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if done, _ := p.transactions(); len(done) > 0 {
			return nil
		}
		if _, err := p.b.in.CtrOf(harness.Stock).Pid(ctx, p.id); err != nil {
			said, _ := os.ReadFile(filepath.Join(p.dir, "pgbench.log"))
			return fmt.Errorf("pgbench did not start: %w: %s", err, strings.TrimSpace(string(said)))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for pgbench's first transactions: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// stop may be called again.
func (p pgbench) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return p.b.in.CtrOf(harness.Stock).Remove(ctx, p.id)
}

// transactions are the times at which transactions ended, in order, by pgbench's
// log: a line each of client, number, microseconds, script, and the time as
// seconds and microseconds (PostgreSQL's manual, pgbench, Per-Transaction Logging).
func (p pgbench) transactions() ([]time.Time, error) {
	files, err := filepath.Glob(filepath.Join(p.dir, "tx.*"))
	if err != nil {
		return nil, err
	}
	var done []time.Time
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			// The last line may be half a one.
			if len(f) < 6 || !strings.HasSuffix(line, "\n") {
				continue
			}
			s, err1 := strconv.ParseInt(f[4], 10, 64)
			us, err2 := strconv.ParseInt(f[5], 10, 64)
			if err := errors.Join(err1, err2); err != nil {
				return nil, fmt.Errorf("pgbench's log %s: %w", path, err)
			}
			done = append(done, time.Unix(s, us*1000))
		}
	}
	slices.SortFunc(done, time.Time.Compare)
	return done, nil
}

// throughput is transactions a second before, over and after a checkpoint, and the
// longest time in milliseconds without any over it.
type throughput struct{ before, during, after, silence float64 }

// rates counts transactions, which are in order.
func rates(done []time.Time, w window, around time.Duration) throughput {
	count := func(from, to time.Time) float64 {
		n := 0
		for _, t := range done {
			if !t.Before(from) && t.Before(to) {
				n++
			}
		}
		return float64(n) / to.Sub(from).Seconds()
	}
	return throughput{
		before: count(w.from.Add(-around), w.from), during: count(w.from, w.to), after: count(w.to, w.to.Add(around)),
		silence: longestSilence(done, w),
	}
}
