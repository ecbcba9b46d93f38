// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/shop"
	shopharness "github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/runtime/netlock"
)

// pool is the shop's number of connections to each server, and with it the most
// orders that can be under way between them.
const pool = 8

// postgresLog is the folder of PostgreSQL's log.
const postgresLog = "/var/lib/postgresql/log"

// shopRun is a shop under load, with what was seen of it.
type shopRun struct {
	t    *testing.T
	in   *harness.Instance
	net  *shopharness.Net
	shop *shopharness.Shop
	load *shopharness.Load
	log  *shop.Log
	refs []string
}

// cut is one checkpoint, and what is needed to judge it.
type cut struct {
	ref    string
	before shop.State
	window shop.Window
	result shopharness.Checkpoint
}

// openShop starts a shop and its load, of so many orders a second or, for 0, as
// many as there can be; all of it goes with the test.
func openShop(ctx context.Context, t *testing.T, in *harness.Instance, rate float64) *shopRun {
	t.Helper()
	for _, image := range []string{harness.DataImage, harness.ToolsImage} {
		in.RequireImage(t, image, harness.CohortOnCohort.Snapshotter)
	}
	r := &shopRun{t: t, in: in, net: newNet(t, "shop")}
	o := shopharness.Options{Ctr: in.CtrOf(harness.CohortOnCohort), Group: in.Name("shop"), Net: r.net, Pool: pool}
	// Into its own file: a restored container's output goes nowhere.
	o.Postgres = []string{"-c", "logging_collector=on", "-c", "log_directory=" + postgresLog}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		s := &shopharness.Shop{Options: o}
		if err := errors.Join(s.Destroy(ctx), in.RemoveImages(ctx, r.refs...)); err != nil {
			t.Errorf("removing the shop: %v", err)
		}
	})
	var err error
	if r.shop, err = shopharness.StartShop(ctx, o); err != nil {
		t.Fatal(err)
	}
	if r.load, err = r.shop.StartLoad(shopharness.LoadOptions{Workers: pool, Rate: rate, Log: filepath.Join(t.TempDir(), "load")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _, _ = r.load.Stop() })
	if err := r.load.WaitAcked(ctx, 100); err != nil {
		t.Fatal(err)
	}
	return r
}

// checkpoint takes the running shop's next checkpoint.
func (r *shopRun) checkpoint(ctx context.Context, cohort shopharness.Cohort) cut {
	r.t.Helper()
	c := cut{ref: fmt.Sprintf("cohort.test/%s:%d", r.shop.Group, len(r.refs))}
	r.refs = append(r.refs, c.ref)
	var err error
	if c.before, err = r.shop.Query.LiveState(ctx); err != nil {
		r.t.Fatal(err)
	}
	c.window.From = time.Now()
	if c.result, err = cohort.Checkpoint(ctx, r.shop.Group, c.ref); err != nil {
		r.t.Fatal(err)
	}
	c.window.To = time.Now()
	r.narrow(ctx, &c)
	return c
}

// narrow makes the window in which a cut lies as short as what the checkpoint
// tells of itself allows. The instant in the image lies within the stop.
func (r *shopRun) narrow(ctx context.Context, c *cut) {
	r.t.Helper()
	out, err := r.in.Cohort(ctx, "inspect", "--json", c.ref)
	if err != nil {
		r.t.Fatal(err)
	}
	var image struct {
		At time.Time `json:"cut_at"`
	}
	if err := json.Unmarshal([]byte(out), &image); err != nil {
		r.t.Fatal(err)
	}
	if image.At.Before(c.window.From) || image.At.After(c.window.To) {
		r.t.Errorf("%s says that it was cut at %v, outside of %v to %v", c.ref, image.At, c.window.From, c.window.To)
	}
	stop := time.Duration(c.result.StopMS * float64(time.Millisecond))
	if from := image.At.Add(-stop); from.After(c.window.From) {
		c.window.From = from
	}
	if to := image.At.Add(stop); to.Before(c.window.To) {
		c.window.To = to
	}
}

// close ends load and shop, and leaves only the images.
func (r *shopRun) close(ctx context.Context) {
	r.t.Helper()
	summary, log, err := r.load.Stop()
	if err != nil {
		r.t.Fatal(err)
	}
	r.log = log
	r.t.Logf("%d orders answered, %.0f a second; the longest time without an answer was %.0f ms", summary.Acked, summary.Rate, summary.MaxGapMS)
	if n := summary.ConnErrors + summary.Timeouts + summary.Refused; n > 0 {
		r.t.Errorf("%d orders failed while the shop was only checkpointed: %s", n, summary.LastError)
	}
	if err := errors.Join(r.shop.Destroy(ctx), r.net.CloseGroup()); err != nil {
		r.t.Fatal(err)
	}
}

// judge restores a cut and returns what is wrong with it; the restored shop is
// destroyed again.
func (r *shopRun) judge(ctx context.Context, c cut) (wrong error) {
	r.t.Helper()
	defer func() {
		if err := r.shop.Destroy(context.WithoutCancel(ctx)); err != nil {
			r.t.Fatal(err)
		}
	}()
	back, err := command(r.t, r.in).Restore(ctx, c.ref)
	if err != nil {
		return err
	}
	// First of all, and by connections of our own: those of the shop may be what
	// is broken.
	netns := netlock.PathOf(back.Members[0].Pid)
	defer func() {
		if wrong != nil {
			wrong = fmt.Errorf("%w\n%s", wrong, lastWords(back))
		}
	}()
	if err := agree(ctx, netns); err != nil {
		wrong = &shop.Violation{Invariant: shop.I2, Detail: err.Error()}
	}
	again, err := r.shop.Restored(ctx, "")
	if err != nil {
		return errors.Join(wrong, err)
	}
	e := shop.Evidence{Cut: c.window, Load: r.log, Before: c.before}
	// A connection that did not survive holds an order back for ever.
	quiet, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if e.Restored, err = again.Query.State(quiet); err != nil {
		return errors.Join(wrong, &shop.Violation{Invariant: shop.I3, Detail: "the restored shop does not come to rest: " + err.Error()})
	}
	if e.Orders, err = again.Query.Orders(quiet); err != nil {
		return errors.Join(wrong, err)
	}
	if err := r.orderAgain(ctx, again, &e); err != nil {
		wrong = errors.Join(wrong, err)
	}
	return errors.Join(wrong, shop.Check(e), sound(ctx, netns))
}

// lastWords is the end of PostgreSQL's log in a restored shop.
func lastWords(back shopharness.Restored) string {
	for _, m := range back.Members {
		files, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(m.Pid), "root", postgresLog, "*"))
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				return err.Error()
			}
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			return "PostgreSQL said last:\n\t" + strings.Join(lines[max(0, len(lines)-15):], "\n\t")
		}
	}
	return "PostgreSQL has left no log"
}

// orderAgain has clients order from a restored shop.
func (r *shopRun) orderAgain(ctx context.Context, s *shopharness.Shop, e *shop.Evidence) error {
	load, err := s.StartLoad(shopharness.LoadOptions{Workers: pool, Log: filepath.Join(r.t.TempDir(), filepath.Base(s.NetNS)+"again")})
	if err != nil {
		return err
	}
	soon, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	waitErr := load.WaitAcked(soon, 50)
	summary, log, err := load.Stop()
	if err != nil {
		return err
	}
	// The restored shop's clients are new: whatever fails is within the group.
	if n := summary.ConnErrors + summary.Timeouts + summary.Refused; n > 0 || waitErr != nil {
		return &shop.Violation{Invariant: shop.I3, Detail: fmt.Sprintf("the restored shop failed %d orders (%s): %v", n, summary.LastError, waitErr)}
	}
	state, err := s.Query.State(ctx)
	if err != nil {
		return err
	}
	e.After, e.AfterState = log, &state
	e.AfterOrders, err = s.Query.Orders(ctx)
	return err
}

// postgres is a connection of our own to a shop's PostgreSQL.
func postgres(ctx context.Context, netns string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig("postgres://postgres@127.0.0.1:5432/postgres?sslmode=disable&application_name=consistency")
	if err != nil {
		return nil, err
	}
	cfg.DialFunc = shopharness.DialIn(netns)
	return pgx.ConnectConfig(ctx, cfg)
}

// agree compares PostgreSQL's count of orders with Redis's, which may be apart by
// what is under way in between.
func agree(ctx context.Context, netns string) error {
	c, err := postgres(ctx, netns)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	cache := redis.NewClient(&redis.Options{Addr: "127.0.0.1:6379", Dialer: shopharness.DialIn(netns), DisableIdentity: true})
	defer cache.Close()
	// Redis on both sides: orders go on while they are counted.
	var first, stored, last int64
	if first, err = cache.Get(ctx, "shop:orders").Int64(); err != nil {
		return err
	}
	if err = c.QueryRow(ctx, `SELECT count(*) FROM orders`).Scan(&stored); err != nil {
		return err
	}
	if last, err = cache.Get(ctx, "shop:orders").Int64(); err != nil {
		return err
	}
	if stored < first-pool || stored > last+pool {
		return fmt.Errorf("asked directly, PostgreSQL has %d orders and Redis counted %d to %d, with at most %d under way", stored, first, last, pool)
	}
	return nil
}

// sound has PostgreSQL check its own files: every page by its checksum, every
// index against its table.
func sound(ctx context.Context, netns string) error {
	c, err := postgres(ctx, netns)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	if _, err := c.Exec(ctx, `CREATE EXTENSION IF NOT EXISTS amcheck`); err != nil {
		return fmt.Errorf("PostgreSQL's amcheck: %w", err)
	}
	rows, err := c.Query(ctx, `SELECT r.relname, h.blkno, h.msg FROM pg_class r, LATERAL verify_heapam(r.oid) h
		WHERE r.relkind = 'r' AND r.relpersistence = 'p' AND r.relname IN ('orders', 'pg_class', 'pg_attribute', 'pg_proc')`)
	if err == nil {
		var found []string
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
			var table, what string
			var block int64
			err := row.Scan(&table, &block, &what)
			return fmt.Sprintf("%s, block %d: %s", table, block, what), err
		})
		if err == nil && len(found) > 0 {
			return fmt.Errorf("PostgreSQL's tables are damaged: %q", found)
		}
	}
	if err != nil {
		return fmt.Errorf("verifying PostgreSQL's tables: %w", err)
	}
	var checked int
	err = c.QueryRow(ctx, `SELECT count(*) FROM (SELECT bt_index_check(i.oid, heapallindexed => true)
		FROM pg_class i JOIN pg_am a ON a.oid = i.relam JOIN pg_index x ON x.indexrelid = i.oid
		WHERE a.amname = 'btree' AND i.relpersistence = 'p' AND x.indisvalid OFFSET 0) checked`).Scan(&checked)
	if err != nil {
		return fmt.Errorf("PostgreSQL's indexes do not agree with its tables: %w", err)
	}
	if checked < 2 {
		return fmt.Errorf("only %d indexes were there to be verified", checked)
	}
	return nil
}

func TestEveryCheckpointOfTheShopUnderLoadIsOneInstant(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, 4*time.Minute)
	r := openShop(ctx, t, in, 400)
	var cuts []cut
	var stops []float64
	pause := newMoments(t)
	for range 20 {
		pause.pass(ctx)
		c := r.checkpoint(ctx, command(t, in))
		cuts, stops = append(cuts, c), append(stops, c.result.StopMS)
	}
	t.Logf("stops in ms: %.0f", stops)
	r.close(ctx)
	for i, c := range cuts {
		if err := r.judge(ctx, c); err != nil {
			t.Errorf("checkpoint %d of %d: %v", i, len(cuts), err)
		}
	}
}
