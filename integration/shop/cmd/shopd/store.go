// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/cohort-project/cohort/integration/shop"
)

const (
	// forever is longer than any test and far from overflowing a time.Time.
	forever = 10 * 365 * 24 * time.Hour
	// appName marks the application's connections in the servers' lists.
	appName = "shopd"
	counter = "shop:orders"
)

// store holds the two pools. Both have a fixed size and are filled at start;
// nothing reaps, pings or retries, so that the pools' connections are the same
// ones for the life of the process unless one breaks, and then it is seen.
type store struct {
	pg    *pgxpool.Pool
	redis *redis.Client
	watch *watch

	mu       sync.Mutex
	backends map[uint32]bool
	clients  map[int64]bool
}

func openStore(ctx context.Context, dsn, redisAddr string, size int) (*store, error) {
	st := &store{watch: &watch{}, backends: map[uint32]bool{}, clients: map[int64]bool{}}
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("PG_DSN: %w", err)
	}
	cfg.MinConns, cfg.MaxConns = int32(size), int32(size)
	cfg.MaxConnLifetime, cfg.MaxConnIdleTime, cfg.HealthCheckPeriod = forever, forever, forever
	cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }
	cfg.ConnConfig.DialFunc = st.watch.dial
	cfg.ConnConfig.RuntimeParams["application_name"] = appName
	cfg.AfterConnect = func(_ context.Context, c *pgx.Conn) error {
		st.mu.Lock()
		defer st.mu.Unlock()
		st.backends[c.PgConn().PID()] = true
		return nil
	}
	cfg.BeforeClose = func(c *pgx.Conn) {
		st.mu.Lock()
		defer st.mu.Unlock()
		delete(st.backends, c.PgConn().PID())
	}
	st.redis = redis.NewClient(&redis.Options{
		Addr: redisAddr, Dialer: st.watch.dial, ClientName: appName,
		PoolSize: size, MaxActiveConns: size, PipelinePoolSize: -1,
		MaxRetries: -1, DialerRetries: 1,
		ReadTimeout: opTimeout, WriteTimeout: opTimeout, PoolTimeout: opTimeout,
		ConnMaxIdleTime: -1, ConnMaxLifetime: -1,
		// Each of these would write to a connection by itself.
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})

	if err := untilUp(ctx, "Redis", func(ctx context.Context) error { return st.redis.Ping(ctx).Err() }); err != nil {
		return nil, err
	}
	if err := untilUp(ctx, "PostgreSQL", func(ctx context.Context) error {
		setup := cfg.ConnConfig.Copy()
		// Not to be taken for one of the pool while its backend ends.
		setup.RuntimeParams["application_name"] = appName + "-setup"
		c, err := pgx.ConnectConfig(ctx, setup)
		if err != nil {
			return err
		}
		defer c.Close(ctx)
		_, err = c.Exec(ctx, `CREATE TABLE IF NOT EXISTS orders (seq bigserial PRIMARY KEY, token text NOT NULL UNIQUE)`)
		return err
	}); err != nil {
		return nil, err
	}
	if st.pg, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return nil, fmt.Errorf("connecting to PostgreSQL: %w", err)
	}
	if err := st.fill(ctx, size); err != nil {
		return nil, err
	}
	// A shop that starts on an old table counts on from it.
	n, _, err := st.count(ctx)
	if err == nil {
		err = st.redis.Set(ctx, counter, n, 0).Err()
	}
	if err != nil {
		return nil, fmt.Errorf("setting Redis's counter: %w", err)
	}
	st.watch.arm()
	return st, nil
}

// untilUp tries until it works: the members of the shop start in any order,
// and one that is not there yet refuses the connection at once.
func untilUp(ctx context.Context, who string, try func(context.Context) error) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; last try: %w", who, ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// fill takes every connection of both pools at once, so that each is made.
func (st *store) fill(ctx context.Context, size int) error {
	var undo []func()
	defer func() {
		for _, u := range undo {
			u()
		}
	}()
	for range size {
		c, err := st.pg.Acquire(ctx)
		if err != nil {
			return fmt.Errorf("filling the pool to PostgreSQL: %w", err)
		}
		undo = append(undo, c.Release)
		r := st.redis.Conn()
		undo = append(undo, func() { _ = r.Close() }) // gives it back to the pool
		id, err := r.ClientID(ctx).Result()
		if err != nil {
			return fmt.Errorf("filling the pool to Redis: %w", err)
		}
		st.clients[id] = true
	}
	if n := st.redis.PoolStats().TotalConns; int(n) != size {
		return fmt.Errorf("the pool to Redis has %d connections, not %d", n, size)
	}
	return nil
}

func (st *store) insert(ctx context.Context, token string) (seq int64, err error) {
	err = pgx.BeginFunc(ctx, st.pg, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, `INSERT INTO orders (token) VALUES ($1) RETURNING seq`, token).Scan(&seq)
	})
	return seq, st.watch.seen("order in PostgreSQL", err)
}

func (st *store) incr(ctx context.Context) (int64, error) {
	n, err := st.redis.Incr(ctx, counter).Result()
	return n, st.watch.seen("INCR in Redis", err)
}

func (st *store) counter(ctx context.Context) (int64, error) {
	n, err := st.redis.Get(ctx, counter).Int64()
	return n, st.watch.seen("GET in Redis", err)
}

func (st *store) count(ctx context.Context) (n, maxSeq int64, err error) {
	err = st.pg.QueryRow(ctx, `SELECT count(*), coalesce(max(seq), 0) FROM orders`).Scan(&n, &maxSeq)
	return n, maxSeq, st.watch.seen("count in PostgreSQL", err)
}

func (st *store) orders(ctx context.Context) ([]shop.Order, error) {
	rows, err := st.pg.Query(ctx, `SELECT seq, token FROM orders ORDER BY seq`)
	if err != nil {
		return nil, st.watch.seen("list in PostgreSQL", err)
	}
	orders, err := pgx.CollectRows(rows, pgx.RowToStructByPos[shop.Order])
	return orders, st.watch.seen("list in PostgreSQL", err)
}

// conns is what the pools hold.
func (st *store) conns() shop.Conns {
	st.mu.Lock()
	defer st.mu.Unlock()
	c := shop.Conns{Redis: int(st.redis.PoolStats().TotalConns), RedisIDs: slices.Sorted(maps.Keys(st.clients))}
	for pid := range st.backends {
		c.PG = append(c.PG, int64(pid))
	}
	slices.Sort(c.PG)
	return c
}

// serverConns is what the servers say is connected.
func (st *store) serverConns(ctx context.Context) (shop.Conns, error) {
	var c shop.Conns
	rows, err := st.pg.Query(ctx, `SELECT pid::bigint FROM pg_stat_activity WHERE application_name = $1 ORDER BY pid`, appName)
	if err == nil {
		c.PG, err = pgx.CollectRows(rows, pgx.RowTo[int64])
	}
	if err != nil {
		return c, st.watch.seen("backends of PostgreSQL", err)
	}
	list, err := st.redis.ClientList(ctx).Result()
	if err != nil {
		return c, st.watch.seen("clients of Redis", err)
	}
	for line := range strings.Lines(list) {
		// "id=3 addr=127.0.0.1:40244 laddr=… fd=8 name=shopd …"
		if !strings.Contains(line, " name="+appName+" ") {
			continue
		}
		id, _, _ := strings.Cut(strings.TrimPrefix(line, "id="), " ")
		n, err := strconv.ParseInt(id, 10, 64)
		if err != nil {
			return c, fmt.Errorf("redis lists a client as %q: %w", line, err)
		}
		c.RedisIDs = append(c.RedisIDs, n)
	}
	slices.Sort(c.RedisIDs)
	c.Redis = len(c.RedisIDs)
	return c, nil
}
